"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) by name, with their data from the Hub or from a folder."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmslim.errors import UserError

FILES = ("json", "csv", "parquet", "text")  # a task of one's own names these, and the files beside them


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval, and keep it quiet and in this process."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("Tasks need lm-eval: pip install 'llmslim[eval]'.")
    for name in ("lm-eval", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # else it forks for every bootstrap, beside torch's threads


def load_tasks(names: Sequence[str], data: str = "", num_fewshot: int | None = None) -> list[Any]:
    """lm-eval's `Task`s and `Group`s of these names, with their data sets.

    Args:
        names: of tasks, groups or tags of lm-eval, or .yaml files that define a task as it asks for.
        data: folder that holds the data sets in the Hub's layout, such as `allenai/ai2_arc`; the Hub when "".
        num_fewshot: solved examples before each question; what the task says, mostly none, when None.

    Raises:
        UserError: for a name that lm-eval does not know, or a data set that cannot be had.
    """
    require_lm_eval()
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("Which tasks? Name one or more, such as --tasks arc_easy,piqa.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot {num_fewshot} is too few: 0 asks the question alone.")
    manager = manager_of(names)
    with data_from(data):
        found = [_loaded(manager, name, data) for name in names]
    loaded = [one for part in found for one in (part if isinstance(part, list) else [part])]
    for task in leaves(loaded):
        own = task.get_config("num_fewshot")
        shots = num_fewshot if num_fewshot is not None and own != 0 else own or 0  # as lm-eval decides it
        _require_runnable(task, shots, data)
        task.set_config(key="num_fewshot", value=shots)
    return loaded


def _loaded(manager: Any, name: str, data: str) -> Any:
    try:
        return manager._load_spec(name)
    except IndexError as error:  # it looks at its first question, which an empty split has not
        where = data or "its data set"
        raise UserError(f"Task {name} takes its questions from a split that {where} lacks.") from error
    except UserError:
        raise
    except Exception as error:  # a definition runs code of its own, which may want packages or the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"Task {name} cannot be loaded: {reason}.") from error


def leaves(loaded: Sequence[Any]) -> list[Any]:
    """The single tasks, of groups too."""
    return [
        task for one in loaded for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])
    ]


def manager_of(names: Sequence[str]) -> Any:
    """A `TaskManager` that knows the names.

    Reading lm-eval's 14,000 definitions takes ten seconds; a task mostly has the name of its file or folder, which is
    then enough.
    """
    from lm_eval.tasks import TaskManager

    wanted = [name for name in names if not is_file(name)]
    folders = definitions()
    manager = TaskManager(
        include_path=[folders[name] for name in wanted if name in folders], include_defaults=False
    )
    if all(name in manager.task_index for name in wanted):
        return manager
    manager = everything()
    unknown = next((name for name in wanted if name not in manager.task_index), None)
    if unknown is not None:
        raise UserError(
            f"lm-eval has no task {unknown!r}{_nearest(unknown, manager.all_tasks)}; `lm-eval ls tasks` prints all."
        )
    return manager


def is_file(name: str) -> bool:
    """Whether that names a definition of one's own.

    Raises:
        UserError: it does, and there is no such file.
    """
    if not name.endswith((".yaml", ".yml")):
        return False
    if not Path(name).is_file():
        raise UserError(f"No task definition at {name}.")
    return True


@functools.cache
def everything() -> Any:
    """A `TaskManager` of all that lm-eval defines."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@functools.cache
def definitions() -> dict[str, str]:
    """Folder of lm-eval's definitions, by the names of its files without .yaml and by its own."""
    import lm_eval.tasks

    found: dict[str, str] = {}
    for folder, _, files in os.walk(Path(lm_eval.tasks.__file__).parent):
        stems = [name.removesuffix(".yaml") for name in files if name.endswith(".yaml")]
        found |= dict.fromkeys(stems, folder)
        found.setdefault(Path(folder).name, folder)
    return found


def _nearest(word: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, 3, cutoff=0.6)
    return f"; the nearest are {', '.join(close)}" if close else ""


@contextmanager
def data_from(folder: str) -> Iterator[None]:
    """Inside, data sets are read from `FOLDER/OWNER/NAME`, and one that cannot be had is told in one sentence.

    Tasks load their data themselves, by `datasets.load_dataset`: that is what this stands in for.
    """
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        here = Path(folder).expanduser() / path if folder else None
        if path in FILES or Path(path).is_dir():  # of a definition of one's own
            here = None
        elif here is not None and not here.is_dir():
            raise UserError(
                f"--data holds no data set {path}: put its files of the Hub into the folder {here}."
            )
        try:
            if here is not None:  # the cache of `datasets` does not tell two folders of one name apart
                kwargs["cache_dir"] = scratch().name
            return _lenient(original(str(here or path), name, *args, **kwargs))
        except Exception as error:  # whatever the libraries, the network or the file system say
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"The data set {path}{f' ({name})' if name else ''} cannot be had: {reason}; with --data FOLDER it "
                f"is read from FOLDER/{path} in the Hub's layout."
            ) from error

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when this process does."""
    return tempfile.TemporaryDirectory(prefix="llmslim-tasks-")


def _lenient(found: Any) -> Any:
    """The data set, with an empty split for each that it lacks: a task names more than it needs."""
    import datasets

    class Splits(datasets.DatasetDict):
        def __missing__(self, split: str) -> Any:
            return next(iter(self.values())).select([])

    return Splits(found) if isinstance(found, datasets.DatasetDict) and found else found


def _require_runnable(task: Any, num_fewshot: int, data: str) -> None:
    """Refuse a task that needs more than a text model and the data at hand."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"Task {name} runs code that the model writes, which llmslim does not do.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Task {name} shows images or sounds, and llmslim asks with text alone.")
    if num_fewshot and not len(task.fewshot_docs() or ()):
        raise UserError(
            f"Task {name} takes its few-shot examples from a split that {data or 'its data set'} lacks: leave out "
            "--num-fewshot."
        )
