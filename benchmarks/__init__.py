"""What the library costs, measured with its peers: `python -m benchmarks [NAME ...] [--json]`.

Each module of this folder with a function `run(options: Options) -> Report` is a benchmark of its own name:

    def run(options: Options) -> Report:
        ours = Case("ours", call("client", "ours", n=1000))
        peer = Case("litellm", call("client", "litellm", n=1000), needs=("litellm",))
        measured = measure([ours, peer], options, repetitions=5)
        return Report(
            rows=measured.rows(),
            targets=[Target("CPU a call, of litellm's", measured.ratio("ours", "litellm", "cpu_us"), 0.25, "x")],
            missing=measured.missing,
        )

`call(module, function, **arguments)` names a function of `benchmarks/<module>.py` that runs in a fresh process and
returns its figures, `{"cpu_us": 12.3}`. Peers run in their own processes and may live in another interpreter
(`--peers-python`), so a benchmark's module imports nothing but the standard library and `benchmarks` at its top.
"""
