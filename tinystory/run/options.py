"""Dataclass fields that are also command-line flags, and the allowed values of each."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn, get_origin, get_type_hints

from tinystory.run.errors import UserError
from tinystory.run.paths import usage


def option(
    default: Any,
    help: str,
    allowed: str | tuple[str, ...] = "",
    *,
    group: str = "",
    flags: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag: `n_layer` is `--n-layer`. allowed: an interval such as
    "[0, 1)", or choices. group: heading in --help, given with the group's first option. flags:
    further names of the flag."""
    metadata: dict[str, Any] = {"help": help, "allowed": allowed, "group": group, "flags": flags}
    if isinstance(allowed, str) and allowed:
        metadata["allowed"] = Interval(allowed)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Interval:
    """The numbers between two bounds, as in "[0, 1)", where a square bracket includes the bound.
    NaN is in no interval."""

    def __init__(self, text: str):
        low, high = text[1:-1].split(",")
        self.text = text
        self.low = float(low)
        self.high = float(high)

    def __contains__(self, number: float) -> bool:
        if number == self.low:
            return self.text[0] == "["
        if number == self.high:
            return self.text[-1] == "]"
        return self.low < number < self.high

    def __str__(self) -> str:
        low = "at least" if self.text[0] == "[" else "above"
        high = "at most" if self.text[-1] == "]" else "below"
        return f"{low} {self.low:.12g} and {high} {self.high:.12g}"


def flag_of(f: dataclasses.Field) -> str:
    return "--" + f.name.replace("_", "-")


def arguments(config_class: type, values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that give the options of a config class these values."""
    words: list[str] = []
    for f in dataclasses.fields(config_class):
        if f.name in values:
            words += argument(f, values[f.name])
    return words


def argument(f: dataclasses.Field, value: Any) -> list[str]:
    """The command-line arguments that give an option this value."""
    if isinstance(value, bool):
        return [flag_of(f) if value else flag_of(f).replace("--", "--no-")]
    words = list(map(str, value)) if isinstance(value, list) else [str(value)]
    if words[0].startswith("-"):
        words[0] = f"{flag_of(f)}={words[0]}"
        return words
    return [flag_of(f), *words]


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


# ---- the command line ----------------------------------------------------------------------------


class ScriptParser(argparse.ArgumentParser):
    """A parser that raises UserError for an unknown option and suggests a similar one."""

    # Our flags, each with or without a description, by names from other libraries. Only the flags of
    # this command are suggested.
    other_names: Mapping[str, Sequence[str]] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the options")

    def parse_args(self, words: Sequence[str] | None = None) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(words)
        if not unknown:
            return options
        word = unknown[0].split("=")[0]
        name = word.lstrip("-").replace("_", "-")
        names = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name, names, 1)
        help = "--help-all" if "help-all" in names else "--help"
        advice = f"{help} lists them all"
        ours = [ours for ours in self.other_names.get(name, ()) if ours.split()[0][2:] in names]
        if ours:
            advice = f"did you mean {' or '.join(ours)}?"
        elif near:
            advice = f"did you mean --{near[0]}?"
        raise UserError(f"there is no option {word}: {advice}")


def script_parser(text: str | None) -> ScriptParser:
    """A parser with a script's docstring at the beginning of --help. Commands in the docstring are
    shown as the user can type them."""
    return ScriptParser(
        description=usage(text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_number(
    parser: argparse.ArgumentParser,
    flag: str,
    default: float | None,
    allowed: str,
    help: str,
) -> None:
    """Add a numeric option, which is an integer if its default is an integer. default: None if
    `help` states the default. Parsing raises UserError for a number outside the interval."""
    interval = Interval(allowed)
    kind = float if default is None else type(default)
    read = _reader(flag, kind)

    def number(text: str) -> float:
        value: float = read(text)
        if value not in interval:
            raise UserError(f"{flag} must be {interval}, not {value}")
        return value

    parser.add_argument(
        flag,
        type=number,
        default=default,
        metavar=_METAVARS[kind],
        help=help + _note(default, interval),
    )


def add_options(
    parser: argparse.ArgumentParser,
    config_class: type,
    names: Sequence[str] = (),
    shown: Container[str] | None = None,
) -> None:
    """Add the fields of a config class (or only `names`) as flags in their groups. A flag that the
    user does not give is missing from the namespace, so presets override defaults but not flags.
    shown: the fields that --help lists (default: all)."""
    types = get_type_hints(config_class)
    group: argparse._ActionsContainer = parser
    for f in dataclasses.fields(config_class):
        if f.metadata["group"] and not names:
            group = parser.add_argument_group(f.metadata["group"])
        if names and f.name not in names:
            continue
        settings = _settings(f, types[f.name])
        if shown is not None and f.name not in shown:
            settings["help"] = argparse.SUPPRESS
        group.add_argument(flag_of(f), *f.metadata["flags"], dest=f.name, **settings)


def _settings(f: dataclasses.Field, kind: Any) -> dict[str, Any]:
    """Keyword arguments of add_argument for a field."""
    allowed = f.metadata["allowed"]
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    help = f.metadata["help"] + _note(default, allowed)
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if kind is bool:
        return settings | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is list:
        return settings | {"nargs": "+", "metavar": "NAME"}
    metavar = _METAVARS[kind]
    if isinstance(allowed, tuple):
        metavar = "{" + ",".join(allowed) + "}"
    return settings | {"type": _reader(flag_of(f), kind), "metavar": metavar}


def _note(default: Any, allowed: object) -> str:
    """The end of a help text, such as " (default: 0.5; at least 0 and at most 1)"."""
    text = "" if default is None else str(default)
    if isinstance(default, list):
        text = " ".join(default)
    elif isinstance(default, bool):
        text = "on" if default else ""
    parts = []
    if text:
        parts.append(f"default: {text}")
    if isinstance(allowed, Interval) and allowed.high <= 2:
        parts.append(str(allowed))
    return f" ({'; '.join(parts)})" if parts else ""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A suggestion of the most similar name, such as " (did you mean demo?)"; "" if no name is
    similar."""
    near = difflib.get_close_matches(word, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _whole(text: str) -> int:
    """An integer written as 1000000, 1_000_000, 1e6 or 1M."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    try:
        return int(digits) * scale
    except ValueError:
        number = float(digits) * scale
        if not number.is_integer():
            raise
        return int(number)


def _reader(flag: str, kind: type) -> Callable[[str], Any]:
    """The function that reads the text of an option. It raises UserError for any other text."""

    def read(text: str) -> Any:
        try:
            return _READERS[kind](text)
        except (ValueError, OverflowError):
            example = ", such as 20000, 20k or 2M" if kind is int else ""
            raise UserError(f"{flag} must be {_KINDS[kind]}{example}, not {text!r:.80}") from None

    return read


_READERS: dict[type, Callable[[str], Any]] = {int: _whole, float: float, str: str}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


# ---- values --------------------------------------------------------------------------------------


def require_valid(f: dataclasses.Field, kind: Any, value: Any) -> None:
    """Raises UserError unless an option's value has the right type and is allowed. The items of a
    list must be texts."""
    must_be = f"{flag_of(f)} must be"
    allowed = f.metadata["allowed"]
    items = [value]
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{must_be} a list, not {value!r:.80}")
        kind = str
        items = value
    for item in items:
        is_of_kind = type(item) is kind or (kind is float and type(item) is int)
        if not is_of_kind:
            raise UserError(f"{must_be} {_KINDS[kind]}, not {item!r:.80}")
        if isinstance(allowed, Interval) and item not in allowed:
            raise UserError(f"{must_be} {allowed}, not {item}")
        if isinstance(allowed, tuple) and item not in allowed:
            choices = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise UserError(f"{must_be} {choices}, not {item!r:.80}{did_you_mean(item, allowed)}")
        if item == "" and f.default != "":  # for example from an unset shell variable
            raise UserError(f"{must_be} given: it is empty")
        if kind is str and ("\0" in item or item != item.encode(errors="replace").decode()):
            raise UserError(f"{must_be} Unicode text without NUL characters, not {item!r:.80}")
