"""Fragments: read the `*.config` files, merge them, and check that a finished .config has what they ask for."""

import re
from dataclasses import dataclass
from pathlib import Path

ASSIGNMENT = re.compile(r"(CONFIG_\w+)=(\S+?|\"[^\"]*\")(\s+#\s*(?P<note>.*))?")
IF_KNOWN = "if known"
"""The note behind an option that only some of the sources we build from have."""


class FragmentError(ValueError):
    """A fragment that cannot be understood, or two that contradict each other."""


@dataclass(frozen=True)
class Option:
    """One wish: `name` (with its CONFIG_ prefix) shall have `value`; "n" means unset or not there at all."""

    name: str
    value: str
    if_known: bool
    origin: str
    """The file and line that asks for it, for messages."""

    def __str__(self) -> str:
        return f"{self.name}={self.value} ({self.origin})"


def parse(text: str, file: str) -> list[Option]:
    """Return the options of one fragment in the order of its lines. Raises FragmentError, naming file and line."""
    options = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = ASSIGNMENT.fullmatch(line.strip())
        origin = f"{file}:{number}"
        if match is None:
            raise FragmentError(f"{origin}: expected CONFIG_NAME=value, found {line.strip()!r}")
        if match["note"] not in (None, IF_KNOWN):
            raise FragmentError(f"{origin}: the only note behind an option is '# {IF_KNOWN}'; comments go above it")
        if match[2] == "m":
            raise FragmentError(f"{origin}: {match[1]}=m: there are no modules in this kernel, build it in with =y")
        options.append(Option(match[1], match[2], match["note"] is not None, origin))
    return options


def merge(options: list[Option]) -> dict[str, Option]:
    """Return the options by name, sorted. Raises FragmentError where one is asked for with two values."""
    merged: dict[str, Option] = {}
    for option in options:
        first = merged.setdefault(option.name, option)
        if first.value != option.value:
            raise FragmentError(f"{option} contradicts {first}")
    return dict(sorted(merged.items()))


def read(paths: list[Path]) -> dict[str, Option]:
    """Return the merged options of the fragment files. Raises FragmentError and OSError."""
    return merge([option for path in paths for option in parse(path.read_text(), path.name)])


def as_config(options: dict[str, Option]) -> str:
    """Return the options as Kconfig reads them: what KCONFIG_ALLCONFIG names, and what the cache key covers."""
    return "".join(f"{option.name}={option.value}\n" for option in options.values())


def parse_dot_config(text: str) -> dict[str, str]:
    """Return the set options of a .config; unset ones are not there."""
    return dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_"))


@dataclass(frozen=True)
class Symbol:
    """What a source tree says of an option: the Kconfig file that defines it and the conditions given there."""

    file: str
    depends: tuple[str, ...]


def known_symbols(tree: Path) -> dict[str, Symbol]:
    """Return every option that the Kconfig files of a kernel tree define, by its name with CONFIG_.

    A simple reading for messages and for IF_KNOWN: enclosing menus and ifs are not followed.
    """
    symbols: dict[str, Symbol] = {}
    for path in tree.rglob("Kconfig*"):
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        for block in re.split(r"(?m)^(?=[ \t]*(?:menu)?config[ \t]+\w+[ \t]*$)", text)[1:]:
            name = "CONFIG_" + block.split(maxsplit=2)[1]
            body = re.split(r"(?m)^(?=\S)", block.split("\n", 1)[1])[0]
            depends = tuple(re.findall(r"(?m)^\s+depends on (.+)$", body.split("\thelp\n")[0]))
            earlier = symbols.get(name, Symbol("", ())).depends
            symbols[name] = Symbol(str(path.relative_to(tree)), earlier + depends)
    return symbols


def check(options: dict[str, Option], final: dict[str, str], symbols: dict[str, Symbol]) -> list[str]:
    """Return one message for each option that the finished .config does not have as asked; empty when all is well."""
    problems = []
    for option in options.values():
        value = final.get(option.name, "n")
        if value == option.value:
            continue
        symbol = symbols.get(option.name)
        if symbol is None:
            if option.if_known:
                continue
            problems.append(f"{option}: this kernel source has no such option")
        elif option.value == "n":
            problems.append(f"{option}: it is {value} in the finished .config, so another option selects it")
        else:
            needs = " and ".join(symbol.depends) or "what surrounds it there"
            problems.append(f"{option}: it is {value} in the finished .config; {symbol.file} wants {needs}")
    return problems
