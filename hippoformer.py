"""`hippoformer COMMAND ...`: all programs of the project under one name, and the files that come with it.

Imports nothing but the standard library until it has looked whose packages it would run: other distributions on PyPI
have packages called `llm` and `evals`, and files of whichever was installed last replace the others'.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = ("llm", "evals", "small")
SMALL = ("grid", "icl", "tem", "vision")
SHELLS = {
    "bash": 'complete -o default -C "hippoformer complete" hippoformer',
    "zsh": 'autoload -U +X bashcompinit && bashcompinit && complete -o default -C "hippoformer complete" hippoformer',
}
OWN = {
    "evals": "what exported models can do, and the verdict on pairs and studies",
    "small": f"the small experiments: small {', small '.join(SMALL)}",
    "configs": "list the configs, studies and Slurm scripts of this version; configs DIR copies them there",
    "completion": f"what a shell needs to complete commands and options: completion {' or '.join(SHELLS)}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if problem := foreign_package():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from llm.common.errors import exit_status

    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        return exit_status(lambda: print(help_text())) if words else _refused(help_text())
    if command == "configs":
        return exit_status(lambda: _configs(words[1:]))
    if command == "completion":
        known = len(words) == 2 and words[1] in SHELLS
        return exit_status(lambda: print(SHELLS[words[1]])) if known else _refused(f"error: give {' or '.join(SHELLS)}")
    if command == "complete" and "COMP_LINE" in os.environ:
        return exit_status(lambda: print("\n".join(completions(os.environ["COMP_LINE"]))))
    program, rest = _program(words)
    return int(importlib.import_module(program).main(rest)) if program else _refused(f"error: give {_small_words()}")


def foreign_package() -> str | None:
    """Return a sentence if one of our packages is of another distribution, else None."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        try:
            other = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            other = None
        if other is not None and any(path.parts[0] == name for path in other.files or ()):
            return (
                f"the distribution {name} {other.version} is installed too, and its package {name} shares a folder "
                f"with ours: install hippoformer into an environment of its own"
            )
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != here:
            where = "nowhere" if spec is None else str(spec.origin or next(iter(spec.submodule_search_locations or [])))
            return f"the package {name} is found in {where}, not in {here}: remove that folder from Python's path"
    return None


def help_text() -> str:
    """Return what `hippoformer --help` prints."""
    from llm.cli import COMMANDS

    lines = {name: text for name, (_, text) in COMMANDS.items()} | OWN
    return "\n".join(
        [
            "usage: hippoformer COMMAND ...; hippoformer COMMAND --help shows its options",
            "",
            *(f"  {name:14}{text}" for name, text in lines.items()),
            f"  {'--version':14}print the version and exit",
            "",
            "example: hippoformer configs . && hippoformer study plan configs/studies/stories.yaml",
        ]
    )


def _refused(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def _small_words() -> str:
    return " or ".join(f"small {name}" for name in SMALL)


def _program(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module that runs a command line, empty if `small` names no experiment, and the words left for it."""
    if words[0] == "evals":
        return "evals.__main__", list(words[1:])
    if words[0] == "small":
        known = len(words) > 1 and words[1] in SMALL
        return f"small.{words[1]}.cli" if known else "", list(words[2:])
    return "llm.cli", list(words)


# ---- Configs, studies and Slurm scripts ------------------------------------------------------------------------------


def shipped() -> Iterator[tuple[str, Path]]:
    """Yield the files that come with this version: the path relative to a project folder, and where the file lies."""
    here = Path(__file__).resolve().parent
    roots = (here, here / "share" / "hippoformer")  # another distribution may have a folder called configs
    root = next((root for root in roots if (root / "configs" / "1b_values.yaml").is_file()), None)
    if root is not None:  # a checkout, or pip install --target, which leaves other paths in its record
        files = [path for folder in ("configs", "slurm") for path in (root / folder).rglob("*")]
        found = {str(path.relative_to(root)): path for path in files}
    else:
        installed = importlib.metadata.files("hippoformer") or []
        found = {str(path).partition("share/hippoformer/")[2]: Path(str(path.locate())) for path in installed}
    yield from ((name, path) for name, path in sorted(found.items()) if name.endswith((".yaml", ".sh", ".py")))


def _configs(words: Sequence[str]) -> None:
    from llm.common.errors import UserError

    if any(word.startswith("-") for word in words) or len(words) > 1:
        raise UserError("hippoformer configs takes nothing, to list the files, or a folder to copy them to")
    files = list(shipped())
    if not words:
        width = max(len(name) for name, _ in files)
        print("\n".join(f"{name:{width}}  {first_comment(path)}" for name, path in files))
        return
    folder = Path(words[0])
    contents = {name: _for_here(path) for name, path in files}
    changed = [
        name for name, text in contents.items() if (folder / name).exists() and (folder / name).read_bytes() != text
    ]
    if changed:
        raise UserError(f"{', '.join(changed)} in {folder} differ from this version's: give another folder")
    for name, path in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents[name])
        shutil.copymode(path, folder / name)
    (folder / "slurm" / "logs").mkdir(exist_ok=True)  # sbatch makes no folder for its --output
    print(f"{len(files)} files copied to {folder}")


def _for_here(path: Path) -> bytes:
    """Return the content of a file; Slurm scripts run the Python that runs this unless PYTHON names another."""
    return path.read_bytes().replace(b"PYTHON:-.venv/bin/python", b"PYTHON:-" + os.fsencode(sys.executable))


def first_comment(path: Path) -> str:
    """Return the first line of the comment or docstring that a file begins with."""
    lines = (line.strip('#" ') for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    return next((line for line in lines if line), "")


# ---- Completion ------------------------------------------------------------------------------------------------------


def completions(line: str) -> list[str]:
    """Return what the last word of a command line may become; empty where that is a path, which the shell completes."""
    from llm.cli import COMMANDS

    words = line.split()[1:]
    begun = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        known = [*COMMANDS, *OWN, "--help", "--version"]
    elif words == ["small"]:
        known = list(SMALL)
    elif words == ["completion"]:
        known = list(SHELLS)
    else:
        known = _options(words)
    return [word for word in known if word.startswith(begun) and (begun or not word.startswith("-"))]


def _options(words: list[str]) -> list[str]:
    """Return the options and subcommands of the parser that the words lead to."""
    import argparse

    from llm.cli import COMMANDS, parser_of

    program, rest = _program(words)
    if program == "llm.cli" and rest[0] in ("fit", "validate"):
        from llm.train.options import parser_of as parser_of_fit

        of_fit = parser_of_fit(rest[0], for_help=True)
        return [option for action in of_fit._actions for option in action.option_strings if option.startswith("--")]
    if program == "llm.cli":
        if rest[0] not in COMMANDS:
            return []
        parser, rest = parser_of(rest[0]), rest[1:]
    elif program:
        parser = importlib.import_module(program)._parser()
    else:
        return []
    for word in rest:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
                break
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [*known, *(name for choices in below for name in choices)]


if __name__ == "__main__":
    sys.exit(main())
