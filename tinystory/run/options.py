"""Dataclass fields that are also command-line flags, and the values that each may have."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

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
    """A dataclass field that is also a flag: `n_layer` is `--n-layer`. help: "": no flag, only
    presets set it. allowed: an interval such as "[0, 1)", or choices. group: heading in --help, on
    its first option. flags: further names."""
    interval = Interval(allowed) if isinstance(allowed, str) and allowed else allowed
    metadata = {"help": help, "allowed": interval, "group": group, "flags": flags}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Interval:
    """The numbers between two bounds, as in "[0, 1)": a square bracket includes its bound. NaN is
    in no interval."""

    def __init__(self, text: str):
        low, high = text[1:-1].split(",")
        self.low, self.high = float(low), float(high)
        self.includes_low, self.includes_high = text[0] == "[", text[-1] == "]"

    def __contains__(self, number: float) -> bool:
        above = self.low <= number if self.includes_low else self.low < number
        return above and (number <= self.high if self.includes_high else number < self.high)

    def __str__(self) -> str:
        low = f"{'at least' if self.includes_low else 'above'} {self.low:.12g}"
        return f"{low} and {'at most' if self.includes_high else 'below'} {self.high:.12g}"


def script_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with a script's docstring, its commands as the user can type
    them."""
    return argparse.ArgumentParser(
        description=usage(text), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_number(
    parser: argparse.ArgumentParser,
    flag: str,
    default: float,
    allowed: str,
    help: str,
    files: str = "",
) -> None:
    """Add a numeric option, an integer if its default is one. Parsing raises UserError outside the
    interval. files: a suffix; the option then takes a list of numbers and of files with that
    suffix."""
    interval, kind = Interval(allowed), type(default)

    def number(text: str) -> Any:
        if files and text.endswith(files):
            return Path(text)
        value = _READERS[kind](text)
        if value not in interval:
            raise UserError(f"{flag} must be {interval}, not {value}")
        return value

    number.__name__ = _KINDS[kind].removeprefix("a ")  # argparse names it in its error message
    help += _note(default, interval)
    settings: dict[str, Any] = dict(default=default, metavar=_METAVARS[kind])
    if files:
        settings = dict(default=[default], metavar=f"N|FILE{files}", nargs="+")
    parser.add_argument(flag, type=number, help=help, **settings)


def _note(default: Any, allowed: object) -> str:
    said = (
        " ".join(default)
        if isinstance(default, list)
        else "on"
        if default is True
        else str(default)
    )
    parts = [f"default: {said}"] * (said not in ("", "False"))
    parts += [str(allowed)] * (isinstance(allowed, Interval) and allowed.high <= 2)
    return f" ({'; '.join(parts)})".replace("%", "%%") if parts else ""


def add_options(
    parser: argparse.ArgumentParser,
    config_class: type,
    names: Sequence[str] = (),
    shown: Container[str] | None = None,
) -> None:
    """Add the fields of a config class (or only `names`) as flags in their groups. A flag left out
    is not in the namespace, so presets override defaults but not flags. shown: the fields that
    --help lists (default: all)."""
    types = get_type_hints(config_class)
    group: argparse._ActionsContainer = parser
    for f in fields(config_class):
        if f.metadata["group"] and not names:
            group = parser.add_argument_group(f.metadata["group"])
        if not f.metadata["help"] or (names and f.name not in names):
            continue
        kind, allowed = types[f.name], f.metadata["allowed"]
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        help = f.metadata["help"].replace("%", "%%") + _note(default, allowed)
        listed = shown is None or f.name in shown
        settings: dict[str, Any] = dict(
            default=argparse.SUPPRESS, help=help if listed else argparse.SUPPRESS
        )
        if kind is bool:
            settings |= dict(action=argparse.BooleanOptionalAction)
        elif get_origin(kind) is list:
            settings |= dict(nargs="+", type=get_args(kind)[0], metavar="NAME")
        else:
            metavar = (
                "{" + ",".join(allowed) + "}" if isinstance(allowed, tuple) else _METAVARS[kind]
            )
            settings |= dict(type=_READERS[kind], metavar=metavar)
        group.add_argument(flag_of(f), *f.metadata["flags"], dest=f.name, **settings)


def unknown_option(word: str, parser: argparse.ArgumentParser) -> str:
    names = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    name = word.lstrip("-").replace("_", "-")
    near = difflib.get_close_matches(name, names, 1)
    # --lr
    near += [full for full in names if name == "".join(part[:1] for part in full.split("-"))]
    return f"there is no option {word}: " + (
        f"did you mean --{near[0]}?" if near else "--help-all lists them all"
    )


def fields(config_class: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(config_class) if f.init]  # all but `preset`


def flag_of(f: dataclasses.Field) -> str:
    """The name of an option for the user: its flag, or its name in config.json if it has none."""
    return "--" + f.name.replace("_", "-") if f.metadata["help"] else f.name


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


_whole.__name__ = "whole number"  # argparse names the type in its error message
_READERS: dict[type, Callable[[str], Any]] = {int: _whole, float: float, str: str}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def mistakes(f: dataclasses.Field, kind: Any, value: Any) -> Iterator[str]:
    """Yields the end of the sentence "OPTION must be ..." for each way in which the value is
    invalid."""
    allowed, is_list = f.metadata["allowed"], get_origin(kind) is list
    scalar = get_args(kind)[0] if is_list else kind
    if is_list and not isinstance(value, list):
        yield f"a list, not {value!r:.80}"
    for item in value if is_list else [value]:
        if not (type(item) is scalar or (scalar is float and type(item) is int)):
            yield f"{_KINDS[scalar]}, not {item!r:.80}"
        if isinstance(allowed, Interval) and item not in allowed:
            yield f"{allowed}, not {item}"
        if isinstance(allowed, tuple) and item not in allowed:
            yield f"{', '.join(allowed[:-1])} or {allowed[-1]}, not {item!r:.80}"
        if item == "" != f.default:  # as from an unset shell variable
            yield "given: it is empty"
        if scalar is str and ("\0" in item or item != item.encode(errors="replace").decode()):
            yield f"Unicode text without NUL characters, not {item!r:.80}"
