"""Run trained code outside this process: find what a function uses, pack it, and check in advance what would fail.

`Surroundings` reads a function's source for what it uses of its module and its instance. The public names (`sandboxed`,
`Limits`, `Sandbox`) are defined in `aggregator.sandbox.limits` and importable from here.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import is_
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import Any, get_type_hints

from msgspec import Struct

from aggregator.agents.code import CodeParameter, source_of
from aggregator.agents.modules import operation_of
from aggregator.agents.parameters import ParameterNode
from aggregator.checks import looks_secret
from aggregator.errors import ConfigError
from aggregator.sandbox.crossing import Call, Function, pack, result_of
from aggregator.sandbox.limits import Limits as Limits  # noqa: PLC0414 - programs import these three from here
from aggregator.sandbox.limits import Place
from aggregator.sandbox.limits import Sandbox as Sandbox  # noqa: PLC0414
from aggregator.sandbox.limits import sandboxed as sandboxed  # noqa: PLC0414

_MUTATORS = frozenset(
    name
    for kind in (list, dict, set)
    for name in vars(kind)
    if name[0] != "_" and not hasattr({list: tuple, dict: MappingProxyType, set: frozenset}[kind], name)
)
"""The methods that change lists, dicts and sets: those that their read-only relatives lack."""
_CLIENTS = {"aggregator", "aiohttp", "anthropic", "google", "httpx", "litellm", "openai", "requests", "socket"}


# ---- what an operation uses: names, modules, attributes of self


class Uses(Struct, frozen=True, kw_only=True):
    """The names in a source, each with the line of its first use (1 is the `def` line).

    `names` are those of its module, `attributes` those of `self`, `imports` the modules that it imports. `problems`
    describe what no sandbox supports.
    """

    names: Mapping[str, int]
    attributes: Mapping[str, int]
    imports: Mapping[str, int]
    problems: Mapping[str, int]


@lru_cache(maxsize=512)
def uses_of(source: str, *, is_method: bool) -> Uses:
    r"""Read a function's source, without running it.

    >>> uses = uses_of("def f(self, x):\n    self.n += 1\n    return helper(x)", is_method=True)
    >>> dict(uses.names), dict(uses.attributes), dict(uses.problems)
    ({'helper': 3}, {'n': 2}, {'changes self.n': 2})
    """
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    reader = _Reader(arguments[0].arg if is_method and arguments else "", _globals_of(source))
    reader.read(tree)
    return Uses(names=reader.names, attributes=reader.attributes, imports=reader.imports, problems=reader.problems)


def _globals_of(source: str) -> frozenset[str]:
    """Return the names that a source takes from its module or from Python itself, except those in annotations."""
    from symtable import SymbolTable, symtable

    def inside(table: SymbolTable) -> Iterator[str]:
        for inner in table.get_children():
            yield from (symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global())
            yield from inside(inner)

    module = symtable(f"from __future__ import annotations\n{source}", "<source>", "exec")
    defaults = [symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()]
    return frozenset((*defaults, *inside(module)))


class _Reader:
    """Collects what a source uses and changes. It does not recurse, because a source may be nested deeply."""

    def __init__(self, self_name: str, outside: frozenset[str]) -> None:
        self.self_name, self.outside = self_name, outside
        self.names: dict[str, int] = {}
        self.attributes: dict[str, int] = {}
        self.imports: dict[str, int] = {}
        self.problems: dict[str, int] = {}
        self._aliases: dict[str, ast.Name | ast.Attribute] = {}  # local names that were set to these

    def read(self, tree: ast.AST) -> None:
        """Visit every node except annotations, in the order of the source."""
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            if see := getattr(self, f"_see_{type(node).__name__.lower()}", None):
                see(node)
            fields = [value for name, value in ast.iter_fields(node) if name not in ("annotation", "returns")]
            inner = [part for value in fields for part in (value if isinstance(value, list) else [value])]
            waiting += [part for part in reversed(inner) if isinstance(part, ast.AST)]

    def _see_name(self, node: ast.Name) -> None:
        if node.id in self.outside:
            self.names.setdefault(node.id, node.lineno)
            if not isinstance(node.ctx, ast.Load):
                self._note(f"changes {node.id} of its module", node)
            if node.id == "super":
                self._note("uses super()", node)

    def _see_attribute(self, node: ast.Attribute) -> None:
        if self._is_self(node.value):
            self.attributes.setdefault(node.attr, node.lineno)
        self._see_subscript(node)

    def _see_subscript(self, node: ast.Attribute | ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._note_change(node, node)

    def _see_call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in _MUTATORS:
            self._note_change(called.value, node)
        if isinstance(called, ast.Name) and called.id in ("setattr", "delattr") and self._is_self(*node.args[:1]):
            self._note("changes self", node)

    def _see_assign(self, node: ast.Assign) -> None:
        value = node.value
        if isinstance(value, ast.Name):
            value = self._aliases.get(value.id, value)
        elif isinstance(value, ast.Attribute) and self._is_self(value.value):
            value = ast.Attribute(ast.Name(self.self_name), value.attr)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._aliases.pop(target.id, None)
                if isinstance(value, ast.Name | ast.Attribute) and target.id not in self.outside:
                    self._aliases[target.id] = value

    def _see_for(self, node: ast.For) -> None:
        if isinstance(node.target, ast.Name):
            self._aliases.pop(node.target.id, None)

    def _see_await(self, node: ast.Await | ast.AsyncFor | ast.AsyncWith) -> None:
        self._note("awaits", node)

    _see_asyncfor = _see_asyncwith = _see_await

    def _see_import(self, node: ast.Import) -> None:
        self._note_imports([alias.name for alias in node.names], node)

    def _see_importfrom(self, node: ast.ImportFrom) -> None:
        self._note_imports([node.module or ""], node)

    def _note_imports(self, imported: list[str], node: ast.stmt) -> None:
        for name in imported:
            self.imports.setdefault(name, node.lineno)
            if name.partition(".")[0] in _CLIENTS:
                self._note(f"imports {name}", node)

    def _note(self, what: str, node: ast.expr | ast.stmt) -> None:
        self.problems.setdefault(what, node.lineno)

    def _note_change(self, target: ast.expr, node: ast.expr) -> None:
        """Note a change of an expression's target outside the function."""
        passed: set[str] = set()
        while isinstance(target, ast.Attribute | ast.Subscript | ast.Name):
            if isinstance(target, ast.Attribute) and self._is_self(target.value):
                self._note(f"changes self.{target.attr}", node)
                return
            if not isinstance(target, ast.Name):
                target = target.value
            elif target.id in self._aliases and target.id not in passed:
                passed.add(target.id)
                target = self._aliases[target.id]
            else:
                break
        if isinstance(target, ast.Name) and target.id in self.outside:
            self._note(f"changes {target.id} of its module", node)

    def _is_self(self, *found: ast.expr) -> bool:
        names = [self._aliases.get(node.id, node) for node in found if isinstance(node, ast.Name)]
        return any(isinstance(node, ast.Name) and node.id == self.self_name for node in names)


_NO_USES = Uses(names={}, attributes={}, imports={}, problems={})
_HIDDEN = "a text that looks like a secret"


class _Found(Struct):
    """What a function uses of its module, by name.

    It holds packed values, modules, keys of functions, and what cannot be sent.
    """

    values: dict[str, Any] = {}
    modules: dict[str, str] = {}
    uses: dict[str, str] = {}
    missing: dict[str, str] = {}


class Surroundings:
    """What an operation's code needs in a worker: its functions by key, and the attributes and methods of `self`.

    `missing` describes what cannot be sent, by the name in the code (`self.x`, `x`).
    """

    def __init__(self, owner: Any, packages: Sequence[str] = ()) -> None:
        self.owner = owner
        self.packages = packages  # those that the code may import although its module does not
        self.functions: dict[str, Function] = {}
        self.methods: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.class_values: dict[str, Any] = {}
        self._own_attributes: set[str] = set()  # those that the original source uses
        self._keys: dict[int, str] = {}

    def add(self, source: str, like: FunctionType, *, is_method: bool, key: str = "", is_own: bool = True) -> None:
        """Add a function as `source`, which replaces `like`, and everything that it uses.

        What only changed source uses is sent without secrets (texts that look like one) and without the user's own
        modules. `is_own` is False for a function that only changed source uses.
        """
        wanted, written = uses_of(source, is_method=is_method), _written(like)
        own = uses_of(written, is_method=is_method) if written else _NO_USES
        around, found = _names_around(like), _Found()
        for trusted in (True, False):  # first everything that the original source uses
            for name in sorted({*wanted.names, *own.names}):
                value = around.get(name)
                operation = operation_of(value)
                if name not in around or (operation.function if operation else value) is like:
                    continue  # Python's own, or the function itself
                if (is_own and name in own.names) is trusted:
                    self._take_name(found, name, value, is_own=trusted)
            for name in sorted(wanted.attributes) if is_method and self.owner is not None else ():
                if (is_own and name in own.attributes) is trusted:
                    self._take_attribute(name, is_own=trusted)
        self.functions[key] = Function(
            source=source,
            name=like.__name__,
            is_method=is_method,
            values=found.values,
            modules=found.modules,
            imports=self._imports(wanted, own if is_own else _NO_USES, around) if wanted.imports else [],
            uses=found.uses,
            missing=found.missing,
        )
        self.missing |= {name: what for name, what in found.missing.items() if name in wanted.names}

    def _imports(self, wanted: Uses, own: Uses, around: Mapping[str, Any]) -> list[str]:
        """Return the imports of packages that the worker loads before it is closed, because many need more rights.

        They are installed packages that the module of the operation imports, modules that its original source imports
        or uses, and packages that its limits permit.
        """
        known = {name: _import_of(value) for name, value in around.items()}
        packages = {module.partition(":")[0].partition(".")[0] for module in known.values()} - sys.stdlib_module_names
        allowed = {name for name in packages if name in sys.modules and _is_installed(sys.modules[name])}
        used = (*own.imports, *[known[name] for name in own.names if name in known], *self.packages)
        allowed.update(name.partition(":")[0].partition(".")[0] for name in used)
        allowed -= sys.stdlib_module_names
        return sorted(name for name in wanted.imports if name.partition(".")[0] in allowed)

    def _take_name(self, found: _Found, name: str, value: Any, *, is_own: bool) -> None:
        """Add the object that a function's module has under a name."""
        try:
            packed = pack(value, wide=True)
        except TypeError:
            if module := _import_of(value):
                if is_own or _is_installed(sys.modules[module.partition(":")[0]]):
                    found.modules[name] = module
                else:
                    found.missing[name] = "a module of your own that the source as written does not use"
            elif key := self._function_key(value, is_own=is_own):
                found.uses[name] = key
            else:
                found.missing[name] = _named(value)
        else:
            if is_own or not _holds_secret(name, value):
                found.values[name] = packed
            else:
                found.missing[name] = _HIDDEN

    def _take_attribute(self, name: str, *, is_own: bool) -> None:
        """Add the class's attribute of a name: a method or a plain value."""
        if is_own:
            self._own_attributes.add(name)
        if name in self.methods or name in self.class_values or f"self.{name}" in self.missing:
            return
        own = getattr(self.owner, "__dict__", {})
        if name in own:
            held = own[name]
            try:
                pack(held.data if isinstance(held, ParameterNode) else held, wide=True)
            except TypeError:
                self.missing[f"self.{name}"] = _named(held)
            return
        kind = next((kind for kind in type(self.owner).__mro__ if name in vars(kind)), None)
        if kind is None:
            return
        held = vars(kind)[name]
        if key := self._function_key(held, is_method=True, is_own=is_own):
            self.methods[name] = key
        elif not is_own and _holds_secret(name, held):
            self.missing[f"self.{name}"] = _HIDDEN
        else:
            try:
                self.class_values[name] = pack(held.data if isinstance(held, ParameterNode) else held, wide=True)
            except TypeError:
                self.missing[f"self.{name}"] = _named(held)

    def _function_key(self, value: Any, *, is_method: bool = False, is_own: bool) -> str:
        """Return the key of a plain function with a known source, adding it if it is new; "" for anything else."""
        if not isinstance(value, FunctionType):
            return ""
        if id(value) in self._keys:
            return self._keys[id(value)]
        operation = operation_of(value)
        like = operation.function if operation else value
        code = operation.code_of(self.owner if is_method else None) if operation else None
        source = code.data if code else _written(like)
        if not source or (operation is None and hasattr(value, "__wrapped__")):
            return ""
        key = self._keys[id(value)] = f"{len(self._keys) + 1} {like.__qualname__}"
        self.add(source, like, is_method=is_method, key=key, is_own=is_own)
        return key

    def attributes(self) -> dict[str, tuple[bool, Any]]:
        """Return the parameters and plain values of `self`: name -> (is a parameter, packed value)."""
        found = {name: (False, value) for name, value in self.class_values.items()}
        for name, value in vars(self.owner).items() if hasattr(self.owner, "__dict__") else ():
            is_parameter = isinstance(value, ParameterNode)
            if isinstance(value, CodeParameter):
                continue
            if not is_parameter and name not in self._own_attributes and _holds_secret(name, value):
                continue
            try:
                found[name] = (is_parameter, pack(value.data if is_parameter else value, wide=True))
            except TypeError:
                continue
        return found


def _holds_secret(name: str, value: Any, levels: int = 64) -> bool:
    """Return True if a plain value is, or holds, a text that looks like a secret by its name, key or form."""
    if isinstance(value, str):
        return looks_secret(name, value)
    if not levels:  # a list that contains itself
        return False
    if isinstance(value, dict):
        return any(_holds_secret(str(key), item, levels - 1) for key, item in value.items())
    return isinstance(value, list | tuple | set | frozenset) and any(
        _holds_secret("", item, levels - 1) for item in value
    )


def _names_around(function: FunctionType) -> dict[str, Any]:
    """Return the names that a function can access: those of its module, and of the enclosing functions."""
    around = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            around[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return around


@lru_cache(maxsize=512)
def _written(function: FunctionType) -> str:
    """Return a function's original source, or "" if it has none or if its decorators are part of it."""
    try:
        source, _ = source_of(function)
    except (ConfigError, SyntaxError):
        return ""
    return source


def _import_of(value: Any) -> str:
    """Return `module` or `module:name` for an object that a worker can import, or "".

    These are modules, and names of installed packages.
    """
    if isinstance(value, ModuleType):
        return value.__name__ if sys.modules.get(value.__name__) is value else ""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(value, type | FunctionType | BuiltinFunctionType) or not (module and name) or "." in name:
        return ""
    home = sys.modules.get(module)
    if home is None or getattr(home, name, None) is not value:
        return ""
    return f"{module}:{name}" if _is_installed(home) else ""


def _is_installed(module: ModuleType) -> bool:
    """Return True for a module of Python or of an installed package, and False for the user's own."""
    if module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return module.__name__ != "__main__"
    folders = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return (getattr(module, "__file__", None) or "").startswith(folders)


def _named(value: Any) -> str:
    """Return a description of a value for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType):
        return f"the function {value.__qualname__}, whose source is not known or is decorated"
    return f"a value of the type {type(value).__name__}"


REDACTED = "REDACTED"
_IS_COROUTINE = 0x80  # inspect.CO_COROUTINE
_IS_GENERATOR = 0x220  # inspect.CO_GENERATOR and CO_ASYNC_GENERATOR
_PLAIN = frozenset({None, type(None), bool, int, float, str, bytes, list, tuple, dict, object, Any})


# ---- calling an operation in the sandbox


def prepare(
    source: str, like: FunctionType, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], limits: Limits
) -> Call:
    """Return the call of `source`, which replaces the function `like`, with everything that it needs.

    Raises ConfigError for an argument that cannot be sent.
    """
    given = args if owner is None else args[1:]
    around = Surroundings(owner, limits.packages)
    around.add(source, like, is_method=owner is not None)
    return Call(
        functions=around.functions,
        args=[_packed(value, f"argument {i} of {like.__name__}") for i, value in enumerate(given)],
        kwargs={name: _packed(value, f"{name} of {like.__name__}") for name, value in kwargs.items()},
        owner=None if owner is None else around.attributes(),
        methods=around.methods,
        asynchronous=bool(like.__code__.co_flags & _IS_COROUTINE),
        seconds=limits.seconds,
        memory=limits.memory,
        output=limits.output,
        most_values=limits.values,
    )


def _packed(value: Any, what: str) -> Any:
    try:
        return pack(value.data if isinstance(value, ParameterNode) else value)
    except TypeError as error:
        raise ConfigError(
            f"Expected {what} to be None, bool, int, float, str, bytes or a list, tuple or dict of them, to cross to "
            f"its sandbox, got {error}; pass plain data, or set sandbox=None in its @bundle"
        ) from None


def sandboxed_function(code: CodeParameter, owner: Any, place: Place) -> Callable[..., Any]:
    """Return a function, async if the original is, that runs a code parameter's current source in a sandbox."""
    source, like = code.data, code.original
    if place.engine == "monty":
        from aggregator.sandbox.monty import arun, run
    else:
        from aggregator.sandbox.pool import arun, run
    if like.__code__.co_flags & _IS_COROUTINE:

        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            call = prepare(source, like, owner, args, kwargs, place.limits)
            return result_of(await arun(call), call)

        return asynchronous

    def synchronous(*args: Any, **kwargs: Any) -> Any:
        call = prepare(source, like, owner, args, kwargs, place.limits)
        return result_of(run(call), call)

    return synchronous


# ---- secrets of the environment


def hide_secrets(value: Any) -> Any:
    """Return the result of trained code, with environment values that look like secrets replaced.

    Such a value would reach prompts, recordings and reports. Containers without one are returned unchanged.
    """
    secrets = environment_secrets()
    return _without(value, secrets) if secrets else value


def hide_secrets_in(error: BaseException) -> BaseException:
    """Replace secrets in the message of an exception of trained code; return the same exception."""
    error.args = hide_secrets(error.args)
    return error


def _without(value: Any, secrets: Sequence[str], levels: int = 64) -> Any:
    kind = type(value)
    if not levels:  # a list that contains itself
        return value
    if kind is str:
        for secret in secrets:
            value = value.replace(secret, REDACTED) if secret in value else value
        return value
    if kind is bytes:
        for secret in secrets:
            value = value.replace(secret.encode(errors="surrogateescape"), REDACTED.encode())
        return value
    if kind in (list, tuple):
        items = [_without(item, secrets, levels - 1) for item in value]
        return value if all(map(is_, items, value)) else kind(items)
    if kind is dict:
        pairs = [(_without(key, secrets), _without(item, secrets, levels - 1)) for key, item in value.items()]
        same = all(new is old and value[old] is item for (new, item), old in zip(pairs, value, strict=True))
        return value if same else dict(pairs)
    return value


def environment_secrets() -> list[str]:
    """Return the values of environment variables that look like secrets, the longest first."""
    return sorted({value for name, value in os.environ.items() if looks_secret(name, value)}, key=len, reverse=True)


# ---- checks before a run starts


def check_sandboxed(operations: Iterable[tuple[str, CodeParameter, Any]]) -> None:
    """Check that trainable operations can run in their sandbox; raises one ConfigError for all that cannot.

    `operations` are (name, code parameter, its instance or None) of those that will run in one. The check reads source
    and values and runs nothing. It does not find what is hidden behind another name or in the values of arguments.
    """
    found = [f"{name} {problems}" for name, code, owner in operations if (problems := _problems(code, owner))]
    if found:
        raise ConfigError(
            "Expected trainable operations that can run in a sandbox, as the code that training writes does, got "
            f"{'; '.join(found)}. Keep that outside of the operation, or set sandbox=None in its @bundle: the code "
            "then runs in this process and may do what your program may do"
        )


def _problems(code: CodeParameter, owner: Any) -> str:
    """Describe what an operation does or uses that no sandbox supports, or return ""."""
    source, like = code.data, code.original
    uses = uses_of(source, is_method=owner is not None)
    around = Surroundings(owner)
    around.add(source, like, is_method=owner is not None)
    lines = {**uses.names, **{f"self.{name}": line for name, line in uses.attributes.items()}}
    facts = [(lines.get(name, 0), f"uses {name}, {what}") for name, what in around.missing.items()]
    facts += [(line, what) for what, line in uses.problems.items()]
    if like.__code__.co_flags & _IS_GENERATOR:
        facts.append((0, "is a generator, whose values cannot be sent"))
    facts += [(1, f"takes {name}: {kind}") for name, kind in _odd_arguments(like)]
    return ", ".join(f"{what} (line {line})" if line else what for line, what in sorted(facts))


def _odd_arguments(like: FunctionType) -> list[tuple[str, str]]:
    """Return the arguments annotated with a class whose values cannot be sent."""
    try:
        hints = get_type_hints(like)
    except Exception:  # noqa: BLE001 - annotations are the user's own, and need not mean anything
        return []
    return [
        (name, getattr(kind, "__name__", str(kind)))
        for name, kind in hints.items()
        if name != "return" and isinstance(kind, type) and not hasattr(kind, "__origin__") and kind not in _PLAIN
    ]
