"""The command line, `r2ec-fast`: quickstart, prepare, reasonings, train, report, evaluate,
diagnose, recommend, serve, index.

Every setting of a command can stand in a YAML file (`--config`) and be overridden behind it. What a
user can mend ends with one line on stderr and exit status 2; R2EC_TRACEBACK=1 shows where it arose.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import (
    ActionSubCommands,
    ArgumentParser,
    Namespace,
    set_loader,
    set_parsing_settings,
)

from r2ec_fast.commands.diagnose import diagnose
from r2ec_fast.commands.evaluate import evaluate
from r2ec_fast.commands.index import index
from r2ec_fast.commands.prepare import prepare
from r2ec_fast.commands.quickstart import quickstart
from r2ec_fast.commands.reasonings import reasonings
from r2ec_fast.commands.recommend import recommend
from r2ec_fast.commands.report import report
from r2ec_fast.commands.serve import serve
from r2ec_fast.commands.train import train
from r2ec_fast.utils.id_lists import load_with_text_ids, split_ids
from r2ec_fast.utils.signals import RunStopped

PROG = "r2ec-fast"
TRACEBACK_VARIABLE = "R2EC_TRACEBACK"
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)
# commands whose options are the arguments of one function
FUNCTIONS: dict[str, Callable[..., object]] = {
    "quickstart": quickstart,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "recommend": recommend,
    "serve": serve,
    "index": index,
    "report": report,
}
# what `prepare` takes -> its function in data.prepare
SOURCES = {
    "generic": "prepare_generic",
    "movielens": "prepare_movielens",
    "amazon": "prepare_amazon",
    "check": "check_amazon",
}


ID_OPTIONS = ("users", "items")  # of `recommend`: text, also where it looks like numbers


class UsageError(ValueError):
    """Arguments that the parser refuses."""


class _Parser(ArgumentParser):
    """A parser whose errors are exceptions: the caller prints one line, not the whole usage.

    Attributes:
        nested: command -> its commands -> their parsers.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.nested: dict[str, dict[str, ArgumentParser]] = {}
        super().__init__(*arguments, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message) from ex

    def validate(self, cfg: Namespace, *arguments: Any, **settings: Any) -> None:
        """Also names an unknown setting of a command within a command, where the parser's own check
        fails without saying which it is."""
        for command, kinds in self.nested.items():
            given = cfg.get(command)
            for kind, sub in kinds.items():
                found = given.get(kind) if isinstance(given, Namespace) else None
                known = {action.dest.split(".")[0] for action in sub._actions}
                unknown = sorted(set(found.as_dict()) - known) if found else []
                if unknown:
                    raise UsageError(
                        f"{command} {kind}: unknown setting {unknown[0]!r}; expected one of "
                        f"{', '.join(sorted(known - {'help', 'config', 'print_config'}))}"
                    )
        super().validate(cfg, *arguments, **settings)

    def dump(self, namespace: Namespace, *arguments: Any, **settings: Any) -> str:
        """What `--print_config` prints: old names of settings become the present ones."""
        from r2ec_fast.config import RENAMED

        namespace = namespace.clone()
        for old, new in RENAMED.items():
            if old in namespace:
                namespace[new.name] = new.now(old, namespace.pop(old))
        return super().dump(namespace, *arguments, **settings)


def build_parser() -> ArgumentParser:
    """The parser of all commands. Settings, defaults and help come from signatures and
    docstrings.
    """
    from r2ec_fast.data import prepare as sources

    load = partial(load_with_text_ids, names=ID_OPTIONS)
    set_loader("yaml-ids", load, exceptions=(yaml.YAMLError, ValueError))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=PROG, description="R2ec: a large recommender model that reasons.")
    commands = parser.add_subcommands(dest="command")

    def command(name: str, text: str, group: ActionSubCommands = commands) -> _Parser:
        sub = _Parser(description=text)
        sub.add_argument(
            "--config", action="config", help="YAML file with settings of the command."
        )
        group.add_subcommand(name, sub, help=text)
        return sub

    def function(name: str, *, positional: bool = False) -> _Parser:
        called = FUNCTIONS[name]
        sub = command(name, _summary(called))
        sub.add_function_arguments(called, as_positional=positional)
        return sub

    function("quickstart")
    text = "Read interactions, split them and write a data set."
    kinds = _Parser(description=text)
    commands.add_subcommand("prepare", kinds, help=text)
    group = kinds.add_subcommands(dest="source")
    for name, source in SOURCES.items():
        called = getattr(sources, source)
        sub = command(name, _summary(called), group)
        sub.add_function_arguments(called, as_positional=False)
        parser.nested.setdefault("prepare", {})[name] = sub
    sub = command("reasonings", _summary(reasonings))
    sub.add_argument("--output_file", type=str, required=True, help="JSONL file to write.")
    _add_settings_of_a_run(sub)
    shown = ("help", "config", "data", "output_file", "reasonings", "seed")
    for action in sub._actions:  # a file of settings for `train` is taken, whatever else it holds
        if action.dest.split(".")[0] not in shown:
            action.help = argparse.SUPPRESS
    _add_settings_of_a_run(command("train", "Train a model on a prepared data set."))
    function("report", positional=True)
    for name in ("evaluate", "diagnose", "serve", "index"):
        function(name)
    function("recommend").parser_mode = "yaml-ids"
    return parser


def _add_settings_of_a_run(sub: ArgumentParser) -> None:
    from r2ec_fast.config import RENAMED, ModelConfig, RecPOConfig

    sub.add_argument("--data", type=str, required=True, help="Prepared data set (directory).")
    sub.add_class_arguments(ModelConfig, "model", as_positional=False)
    sub.add_class_arguments(RecPOConfig, as_positional=False)
    kinds_of = get_type_hints(RecPOConfig)
    for old, new in RENAMED.items():  # taken, not shown
        kind = str if new.values else kinds_of[new.name]
        sub.add_argument(f"--{old}", type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _with_written_ids(arguments: Sequence[str]) -> list[str]:
    """The arguments of `recommend` with its lists of ids as lists of text, however they look."""
    out = list(arguments)
    if not out or out[0] != "recommend":
        return out
    for place, argument in enumerate(out):
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--")
        if name not in ID_OPTIONS or option == name:
            continue
        if equals:
            out[place] = f"{option}={json.dumps(split_ids(value, name), ensure_ascii=False)}"
        elif place + 1 < len(out):
            out[place + 1] = json.dumps(split_ids(out[place + 1], name), ensure_ascii=False)
    return out


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one command; errors are exceptions."""
    from r2ec_fast.config import RENAMED, ModelConfig, RecPOConfig
    from r2ec_fast.prompts.builder import PromptConfig

    parser = build_parser()
    arguments = _with_written_ids(sys.argv[1:] if arguments is None else arguments)
    settings = parser.parse_args(arguments)
    _quiet_progress_bars()
    name = settings.command
    if name == "prepare":
        source = settings.prepare.source
        prepare(source, **_values(settings.prepare[source]))
    elif name in ("train", "reasonings"):
        values = _values(settings[name])
        if any(old in values for old in RENAMED):  # then a new one must have been given to count
            values = _values(parser.parse_args(arguments, defaults=False)[name])
        data, model = values.pop("data"), values.pop("model", {})
        if name == "reasonings":
            reasonings(data, values.pop("output_file"), RecPOConfig(**values))
            return
        prompts = PromptConfig(**model.pop("prompts", {}))
        train(data, ModelConfig(**model, prompts=prompts), RecPOConfig(**values))
    else:
        FUNCTIONS[name](**_values(settings[name]))


def _quiet_progress_bars() -> None:
    # transformers draws them into log files too; tqdm's own are shown on a terminal only
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _values(settings: Namespace) -> dict[str, Any]:
    values = settings.as_dict()
    values.pop("config", None)
    return values


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a mistake that the user can mend)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("r2ec_fast").setLevel(logging.INFO)
    try:
        run_command(arguments)
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        sys.stderr.write(f"{PROG}: error: {message}\n")
        return 2
    except RunStopped as stop:
        sys.stderr.write(f"{PROG}: {stop}\n")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
