"""Write a tiny llama with random weights: `python make_tiny_gguf.py tiny.gguf`.

It talks nonsense, yet through a real tokenizer, a real sampler and a real server. Needs numpy and gguf, which the
library does not; `install_peers.py` runs it with a Python that has them.
"""

from __future__ import annotations

import sys
from importlib import import_module

CONTEXT, EMBEDDING, FEED_FORWARD, BLOCKS, HEADS = 16384, 64, 128, 2, 4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTROL, NORMAL, UNKNOWN, BYTE = 3, 1, 2, 6


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Byte tokens (any text can be encoded) and the printable characters, so that text is mostly readable."""
    tokens = ["<unk>", "<s>", "</s>"]
    kinds = [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    kinds += [BYTE] * 256
    characters = ["\u2581", *(chr(i) for i in range(33, 127))]
    tokens += characters
    kinds += [NORMAL] * len(characters)
    return tokens, [-float(i) for i in range(len(tokens))], kinds


def write(path: str) -> None:
    """Write the model; the same seed gives the same bytes."""
    gguf, np = import_module("gguf"), import_module("numpy")
    tokens, scores, kinds = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(BLOCKS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)  # noqa: FBT003 - its only parameter
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), EMBEDDING), "output": (len(tokens), EMBEDDING)}
    for i in range(BLOCKS):
        shapes |= {f"blk.{i}.attn_{part}": (EMBEDDING, EMBEDDING) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}": (FEED_FORWARD, EMBEDDING) for part in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (EMBEDDING, FEED_FORWARD)}
    norms = ["output_norm", *(f"blk.{i}.{part}_norm" for i in range(BLOCKS) for part in ("attn", "ffn"))]
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.05, shape).astype(np.float32))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(EMBEDDING, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1])
