"""push(): a verified checkpoint with its card and report to the Hub, never over files that are not this run's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslim.errors import UserError, first_line
from llmslim.loaders.digest import sha256_of
from llmslim.report.head import card_problem
from llmslim.report.public import cutter, published
from llmslim.report.schema import read_report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WRITTEN_LAST = ("README.md", "report.json", "report.md", "report.html", "steps.svg")
"""What tells of a checkpoint: written after its files were verified and hashed."""
MADE_BY_THE_HUB = ".gitattributes"
PLACE = '"FOLDER"'  # where the checkpoint lies, in the card's snippets

NEW, SAME, REPLACED, DELETED = "new", "same", "replaces another", "deleted"


@dataclass(frozen=True)
class Item:
    """One file of an upload; `fate` is NEW, SAME (there already), REPLACED or DELETED."""

    path: str
    bytes: int
    fate: str


@dataclass(frozen=True)
class Upload:
    """What went up, or would.

    Attributes:
        url: of the repository.
        items: every file of the checkpoint, and with `overwrite` what was deleted for it.
        commit: made; None for a dry run and where all was there already.
        compared: whether `items` were compared with the repository (a dry run without a token is not).
    """

    repo_id: str
    url: str
    items: tuple[Item, ...]
    commit: str | None
    compared: bool


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Publish a checkpoint that llmslim made and verified: weights, tokenizer, model card and report, in one commit.

    Only what the run made goes up, and only if it is still what was verified. An upload that broke off goes on when
    called again: the Hub keeps what reached it. The token is taken from HF_TOKEN or `hf auth login`.

    Args:
        folder: output of a run.
        repo_id: user/name or organization/name; made if it is not there.
        private: make it private; one that is public already is refused.
        overwrite: replace and delete files there that are not this run's; refused without.
        dry_run: change nothing; without a token do not even look at the repository.

    Raises:
        UserError: no finished checkpoint, unverified or changed since, a bad name or card, no token or rights, files
            of another's in the repository, or a Hub that cannot be reached.
    """
    folder = Path(folder)
    _check_name(repo_id)
    files = _verified_files(folder)
    written = _written_for(folder, repo_id)
    api = _api(required=not dry_run)
    url = f"{_endpoint()}/{repo_id}"
    if api is None:
        items = tuple(Item(path, _size(path, file, written), NEW) for path, file in files.items())
        return Upload(repo_id, url, items, None, compared=False)
    _refuse_secrets(files, str(api.token))
    with _said_plainly(repo_id):
        there = _state(api, repo_id)
        items = _fates(files, written, there.files)
        _refuse_foreign(repo_id, items, there, private, overwrite)
        if not dry_run:
            _validate(written["README.md"], folder)
            commit = _upload(api, repo_id, files, written, items, there, private)
            return Upload(repo_id, url, items, commit, compared=True)
    return Upload(repo_id, url, items, None, compared=True)


def check_target(repo_id: str, private: bool = False) -> None:
    """Before a run that ends in a push: refuse a bad name, a missing token, and a repository that holds files.

    Raises:
        UserError: see above.
    """
    _check_name(repo_id)
    api = _api(required=True)
    assert api is not None
    with _said_plainly(repo_id):
        there = _state(api, repo_id)
        held = tuple(Item(path, 0, DELETED) for path in there.files)
        _refuse_foreign(repo_id, held, there, private, overwrite=False)


def file_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a finished checkpoint, by path; for the report of a run.

    Hidden files, the state of the run and what is written later (card, report) are left out, and TensorBoard's, which
    name the machine.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.split("/")) or path.startswith("tensorboard/")
        if file.is_file() and not hidden and path not in (*WRITTEN_LAST, "progress.json"):
            found[path] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return found


# --- the checkpoint -----------------------------------------------------------------------------------------


def _verified_files(folder: Path) -> dict[str, Path]:
    """The files to upload by path, if they are what the run verified."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} is no checkpoint: name the --output folder of a finished run (config.json, weights)."
        )
    if not (folder / "report.json").is_file():
        raise UserError(
            f"{folder} has no report.json, so nothing says that it was verified: push the output of a run of llmslim."
        )
    report = read_report(folder)
    record = report.get("files")
    if report["verification"]["ok"] is not True:
        raise UserError(
            f"The verification of {folder} failed (report.json says so): make it again before it goes up."
        )
    if not record:
        raise UserError(
            f"{folder}/report.json is of an older llmslim and does not say which files were verified: run again."
        )
    for path, told in record.items():
        _check_file(folder, path, told)
    late = {name: folder / name for name in WRITTEN_LAST if (folder / name).is_file()}
    if "README.md" not in late:
        raise UserError(f"{folder} has no README.md, the model card that its run wrote: run again.")
    return {**{path: folder / path for path in record}, **late}


def _check_file(folder: Path, path: str, told: dict[str, Any]) -> None:
    file = folder / path
    inside = file.resolve().is_relative_to(folder.resolve())  # a report from elsewhere may name any path
    if not inside or not file.is_file():
        raise UserError(
            f"{path} of {folder} was verified and is gone: make the checkpoint again before it goes up."
        )
    if file.stat().st_size != told["bytes"] or sha256_of(file) != told["sha256"]:
        raise UserError(
            f"{path} of {folder} is not the file that was verified, it changed since: make the checkpoint again."
        )


def _written_for(folder: Path, repo_id: str) -> dict[str, bytes]:
    """The card and the reports as they go up: without the paths of this machine; the card names the repository."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    cut = cutter(report)
    card = cut((folder / "README.md").read_text("utf-8", errors="replace"))
    problem = card_problem(card)
    if problem:
        raise UserError(
            f"The Hub would reject the card of {folder}: {problem}; mend the head of its README.md."
        )
    card = card.replace(PLACE, f'"{repo_id}"').replace(f"serve {PLACE[1:-1]}", f"serve {repo_id}")
    pages = [name for name in ("report.md", "report.html") if (folder / name).is_file()]
    return {
        "README.md": card.encode(),
        "report.json": (json.dumps(published(report), indent=2) + "\n").encode(),
        **{name: cut((folder / name).read_text("utf-8")).encode() for name in pages},
    }


def _refuse_secrets(files: dict[str, Path], token: str) -> None:
    for path, file in files.items():
        if file.suffix != ".safetensors" and token.encode() in file.read_bytes():
            raise UserError(f"{path} holds your Hub token, so it does not go up: take it out and run again.")


# --- the repository -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """A repository as it is: its head, its files with (kind, hash of the content), and whether it is private."""

    head: str | None  # None: there is no repository
    files: dict[str, tuple[str, str]]
    private: bool = False


def _check_name(repo_id: str) -> None:
    name = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
    if (
        len(repo_id) > 96
        or not re.fullmatch(f"{name}/{name}", repo_id, re.ASCII)
        or re.search(r"\.\.|--", repo_id)
    ):
        raise UserError(
            f"{repo_id!r} is no name for a repository of the Hub: give user/name, such as ann/smollm2-4bit."
        )


def _api(required: bool) -> HfApi | None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    token = None if HF_HUB_OFFLINE and not required else get_token()
    if token:
        return HfApi(token=token)
    if required:
        raise UserError(
            "A push takes a token of the Hub with write access: set HF_TOKEN, or run `hf auth login`."
        )
    return None


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT


def _state(api: HfApi, repo_id: str) -> _State:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return _State(None, {})
    files = {
        sibling.rfilename: ("sha256", sibling.lfs.sha256) if sibling.lfs else ("blob", sibling.blob_id or "")
        for sibling in info.siblings or []
    }
    return _State(info.sha, files, bool(info.private))


def _size(path: str, file: Path, written: dict[str, bytes]) -> int:
    return len(written[path]) if path in written else file.stat().st_size


def _fates(
    files: dict[str, Path], written: dict[str, bytes], there: dict[str, tuple[str, str]]
) -> tuple[Item, ...]:
    items = []
    for path, file in files.items():
        kind, digest = there.get(path, ("", ""))
        same = digest == _digest(kind, file, written.get(path))
        fate = (SAME if same else REPLACED) if path in there else NEW
        items.append(Item(path, _size(path, file, written), fate))
    strangers = sorted(there.keys() - files.keys() - {MADE_BY_THE_HUB})
    return (*items, *(Item(path, 0, DELETED) for path in strangers))


def _digest(kind: str, file: Path, content: bytes | None) -> str:
    """The hash that the Hub tells of a content: SHA-256 of large files, git's own of others."""
    if kind == "sha256":
        return sha256_of(file) if content is None else hashlib.sha256(content).hexdigest()
    if kind != "blob":
        return ""
    content = file.read_bytes() if content is None else content
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refuse_foreign(
    repo_id: str, items: tuple[Item, ...], there: _State, private: bool, overwrite: bool
) -> None:
    if private and there.head is not None and not there.private:
        raise UserError(f"{repo_id} is there and public: leave out --private, or name another repository.")
    foreign = [
        item.path for item in items if item.fate in (REPLACED, DELETED) and item.path != MADE_BY_THE_HUB
    ]
    if foreign and not overwrite:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UserError(
            f"{repo_id} holds files that are not this run's ({', '.join(foreign[:3])}{more}): name another "
            "repository, or push with --overwrite to replace what is there."
        )


def _validate(card: bytes, folder: Path) -> None:
    """Ask the Hub about the card before a repository is made or a byte of weights sent."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card.decode()).validate()
    except ValueError as error:
        try:
            found = "; ".join(str(entry["message"]) for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            found = str(error).strip().splitlines()[0]
        raise UserError(
            f"The Hub rejects the card of {folder}: {found}; mend the head of its README.md."
        ) from None


def _upload(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path],
    written: dict[str, bytes],
    items: tuple[Item, ...],
    there: _State,
    private: bool,
) -> str | None:
    """One commit, refused by the Hub if another's came in between (`parent_commit`)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationAdd(item.path, written.get(item.path) or files[item.path])
        for item in items
        if item.fate in (NEW, REPLACED)
    ]
    operations += [CommitOperationDelete(item.path) for item in items if item.fate == DELETED]
    if not operations:
        return None
    head = there.head
    if head is None:
        api.create_repo(repo_id, private=private)
        head = api.model_info(repo_id).sha
    done = api.create_commit(repo_id, operations, commit_message="Upload by llmslim", parent_commit=head)
    return done.oid


@contextmanager
def _said_plainly(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way there in one sentence each. `from None`: nothing of a request is shown."""
    from huggingface_hub.errors import HfHubHTTPError

    again = "the same command goes on where this one stopped"
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        told = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        sentence = {
            401: "The Hub does not take this token: make one with write access in its settings, and set HF_TOKEN.",
            403: f"The token may not write to {repo_id}: take one with write access, or a name of your own.",
            404: f"The token may not see {repo_id}: take one with access to it, or another name.",
            409: f"{repo_id} is taken, or changed while it was pushed to: {again}, or name another repository.",
            412: f"{repo_id} changed while it was pushed to: {again} if what came in between is yours.",
        }.get(status, f"The Hub answered {status} ({told}); {again}.")
        raise UserError(sentence) from None
    except (
        OSError,
        RuntimeError,
    ) as error:  # the file and the upload behind a RuntimeError of huggingface_hub
        raise UserError(f"The upload to {repo_id} broke off ({first_line(error)}): {again}.") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "huggingface_hub"):
            raise
        raise UserError(
            f"The Hub at {_endpoint()} cannot be reached ({first_line(error)}): {again}, when it can."
        ) from None
