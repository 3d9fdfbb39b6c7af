"""One step's pass over a model: read a block, decide, write it, free it; resumable at every block."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy import Block
from llmslim.anatomy.parts import is_packed
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.checkpoint.formats import Format
from llmslim.checkpoint.inventory import part_of
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.checkpoint.writer import CheckpointWriter
from llmslim.edit import parse_edit
from llmslim.files import load_tensors, save_tensors, write_atomically
from llmslim.history import CURVES, TRAINING, curves, rewrite
from llmslim.loaders.models import ModelFiles, place, release, tie
from llmslim.memory import return_freed_memory
from llmslim.step import BlockStep, StepRecord
from llmslim.ties import shared_modules
from llmslim.work import Progress, WorkFolder

PROBE_TOKENS = 64  # length of the window that verification sends through the saved checkpoint


@dataclass
class PassOptions:
    """What every pass of a run shares.

    Attributes:
        tokens: calibration windows [samples, seq], or None when no step of the run looks at a text.
        dtype: what blocks are computed in; `stored` what dense tensors of the output are stored in.
        base: the model that the run starts from, for steps that learn from it.
    """

    tokens: Tensor | None
    seed: int
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    base: ModelFiles | None = None


class BlockPass:
    """Streams one model through one `BlockStep`, from `files` to `folder`.

    Args:
        number: which pass of the run this is; names its state in the work folder.
        survey: what the step found out beforehand.
    """

    def __init__(
        self,
        step: BlockStep,
        files: ModelFiles,
        folder: Path,
        form: Format,
        options: PassOptions,
        work: WorkFolder,
        number: int,
        survey: dict[str, Tensor],
        notes: list[dict[str, Any]],
    ) -> None:
        self.step, self.options, self.work = step, options, work
        self.reader = CheckpointReader(files)
        self.model = self.reader.model_skeleton()
        self.stream = BlockStream(self.model, options.device, options.dtype)
        self.reference: BlockStream | None = None
        tokens = 0 if options.tokens is None else options.tokens.numel()
        if step.follows_reference(self.stream.anatomy, tokens):
            self.reference = BlockStream(self.reader.model_skeleton(), options.device, options.dtype)
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = CheckpointWriter(folder, form, options.stored)
        self.scratch = work.scratch(f"pass-{number}")
        self.state = work.state.setdefault("passes", {}).setdefault(
            str(number),
            {
                "blocks": 0,
                "outer": False,
                "finished": False,
                "seconds": 0.0,
                "edits": [],
                "linears": [],
                "notes": notes,
            },
        )
        self.record = recorded(self.state, survey)
        self.record.stored, self.record.source = options.stored, files
        self.drops = step.drops(self.stream.anatomy, survey)
        self.new_names = self._new_names()
        self._streams = [self.stream, *([self.reference] if self.reference else [])]

    def run(self, progress: Progress) -> StepRecord:
        """Do what is not done yet, and leave the parts of the checkpoint in the folder."""
        if self.state["finished"]:
            return self.record
        self._add_lanes()
        self._load_lanes()
        stacks = self.stream.anatomy.stacks
        counts = [len(stack.blocks) for stack in stacks]
        begun = self.state["blocks"]  # of an earlier run
        inside = next((i for i in range(len(stacks)) if sum(counts[:i]) < begun < sum(counts[: i + 1])), None)
        if inside is not None:
            self._enter(inside, pristine=True)
        for edit in self.record.edits:
            edit.apply(self.model)
        if not self.state["outer"]:
            self._change_outer()
        done = 0
        for number, count in enumerate(counts):
            if done + count > begun:
                if number != inside:
                    self._enter(number)
                self._stack(number, done, begun, sum(counts), progress)
            done += count
        progress(self.step.kind, done, done)
        self._probe_outputs()
        self.record.edits += self.drops  # last: until now every block had its place in the files
        self.state["edits"] = [edit.to_json() for edit in self.record.edits]
        self.state["finished"] = True
        self.work.save()
        return self.record

    def _stack(self, number: int, done: int, begun: int, total: int, progress: Progress) -> None:
        """Compress the blocks of a stack behind the first `begun` of the model."""
        stack = self.stream.anatomy.stacks[number]
        for block in stack.blocks:
            done += 1
            if done <= begun:
                continue
            self.record.tell = lambda note, done=done: progress(self.step.kind, done - 1, total, note)  # type: ignore[misc]
            progress(self.step.kind, done - 1, total)
            started = time.process_time()
            self._block(block)
            self._keep_history(block)
            if block.index == len(stack.blocks) - 1:
                for stream in self._streams:
                    stream.leave(stream.anatomy.stacks[number])
            return_freed_memory()  # of experts, each with another number of tokens, holes stay
            self.state["blocks"] = done
            self._save(started)

    def _keep_history(self, block: Block) -> None:
        """Write down how the block was trained; a killed run may have done so before."""
        history, self.record.training = self.record.training, []
        if not history:
            return
        own = {"pass": self.scratch.name, "method": self.step.kind, "block": block.name}
        rewrite(
            self.work.path / TRAINING,
            ({**own, **entry} for entry in history),
            lambda e: own.items() <= e.items(),
        )
        writer = curves(self.work.path / CURVES / self.scratch.name.lstrip("."))
        if writer is None:
            return
        for entry in history:
            for what in ("loss", "eval_loss"):
                writer.add_scalar(f"{block.name}/{what}", entry[what], entry["step"])
        writer.close()

    def _block(self, block: Block) -> None:
        if block.index > 0:  # the first one was filled to enter the stack
            self._fill(block.name, forget=True)
        if (name := self.new_names[block.name]) is not None:
            followers = shared_modules(self.model)
            self._follow(block, followers)
            self.step.compress_block(block, self.stream, self.reference, self.record)
            self._round(block.module.modules())
            self._keep_shared(block, set(followers.values()))
            probe = self.stream.lanes["probe"]
            self.stream.forward(block, probe)
            hidden = torch.cat(probe.hidden).cpu()
            save_tensors(self.scratch / f"block-{name}.safetensors", {"hidden": hidden})
            self.writer.write_block(self.model, block.name, name)
        for stream in self._streams:
            release(stream.model, block.name)

    def _follow(self, block: Block, followers: dict[str, str]) -> None:
        """What uses the weights of an earlier block takes what the step has made of those."""
        for name, source in followers.items():
            kept = self.scratch / f"shared-{source}.safetensors"
            if not name.startswith(f"{block.name}.") or not kept.exists():
                continue
            for edit in self.record.edits.copy():
                if f"{getattr(edit, 'module', '')}.".startswith(f"{source}."):
                    moved = edit.model_copy(update={"module": name + edit.module.removeprefix(source)})  # type: ignore[attr-defined]
                    moved.apply(self.model)
                    self.record.edits.append(moved)
            for path, tensor in load_tensors(kept).items():
                place(self.model, name + path, tensor.to(self.options.device))

    def _keep_shared(self, block: Block, sources: set[str]) -> None:
        """Keep the weights that later blocks use, as they came out, if there are any."""
        for source in sources:
            if source.startswith(f"{block.name}."):
                module = self.model.get_submodule(source)
                own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                tensors = {
                    f".{path}": t.detach() for path, t in own.items() if path.rpartition(".")[2] != "bias"
                }
                save_tensors(self.scratch / f"shared-{source}.safetensors", tensors)

    def _new_names(self) -> dict[str, str | None]:
        """What each block is called when the dropped ones are gone; None for those."""
        names: dict[str, str | None] = {block.name: block.name for block in self.stream.anatomy.blocks}
        for drop in self.drops:
            names |= {name: drop.renamed(name) for name in names if name.startswith(f"{drop.stack}.")}
        return names

    @torch.no_grad()
    def _round(self, modules: Iterable[nn.Module]) -> None:
        """Round what a step computed to what the checkpoint can hold, so that the probe sees what is saved."""
        for module in modules:
            for leaf, parameter in module._parameters.items():
                grid = is_packed(module) and leaf != "bias"  # packed weights are stored as they are
                if parameter is not None and parameter.is_floating_point() and not grid:
                    parameter.copy_(parameter.to(self.options.stored))

    def _fill(self, prefix: str | None, forget: bool = False) -> None:
        """Read a part; of a model that had to be loaded whole, `forget` drops what the reader holds of it."""
        options = self.options
        self._fill_reference(prefix)
        self.reader.fill(
            [self.model], prefix, options.dtype, options.stored, forget=forget, device=options.device
        )

    def _fill_reference(self, prefix: str | None) -> None:
        if self.reference:
            options = self.options
            self.reader.fill([self.reference.model], prefix, options.dtype, device=options.device)

    def _change_outer(self) -> None:
        """Let the step change what lies outside the blocks; keep the result for whenever it is needed."""
        started = time.process_time()
        for name in self.reader.unread_blocks:
            self.record.note(
                name, "in the model's files, but beyond the blocks that its config counts: left out"
            )
        self._fill(None)
        self.step.compress_outer(self.stream, self.record)
        self._round(module for _, module in part_of(self.model, None))
        self.writer.write_outer(self.model)
        save_tensors(self.scratch / "outer.safetensors", self._outer_parameters())
        self._release_outer()
        self.state["outer"] = True
        self._save(started)

    def _outer_parameters(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach() for name in _outer_names(self.stream)}

    def _enter(self, number: int, pristine: bool = False) -> None:
        """Bring the lanes in front of a stack; a resumed one is entered with the model as it was at first."""
        if pristine or not (self.scratch / "outer.safetensors").exists():
            self._fill(None)
        else:
            self._restore_outer()
            self._fill_reference(None)
        self._fill(self.stream.anatomy.stacks[number].blocks[0].name)
        for stream in self._streams:
            stream.enter(stream.anatomy.stacks[number])
        self._release_outer()
        if pristine:
            release(self.model, self.stream.anatomy.stacks[number].blocks[0].name)

    def _restore_outer(self) -> None:
        for name, tensor in load_tensors(self.scratch / "outer.safetensors").items():
            place(self.model, name, tensor.to(self.options.device))
        tie(self.model)

    def _release_outer(self) -> None:
        for stream in self._streams:
            for name in _outer_names(stream, tied=True):
                place(stream.model, name, torch.empty_like(stream.model.get_parameter(name), device="meta"))

    def _add_lanes(self) -> None:
        two_sided = bool(self.model.config.is_encoder_decoder)
        if self.step.streams_calibration:
            assert self.options.tokens is not None
            windows = self.options.tokens
            if self.step.text_limit is not None:
                windows = windows[: max(1, self.step.text_limit // windows.shape[1])]
            lane = Lane.of_tokens("calibration", windows, two_sided, self.step.windows_per_chunk)
            self.stream.add(lane)
            if self.reference:
                followed = math.ceil(len(lane.inputs) * self.step.reference_share)
                self.reference.add(Lane("calibration", lane.inputs[:followed]))
        probe = probe_tokens(self.model, self.options.seed)
        self.stream.add(Lane.of_tokens("probe", probe, two_sided))
        save_tensors(self.scratch / "tokens.safetensors", {"tokens": probe})
        dtype = str(self.options.dtype).removeprefix("torch.")
        source, device = str(self.reader.files.folder), str(self.options.device)
        settings = {"dtype": dtype, "device": device, "source": source}
        write_atomically(self.scratch / "probe.json", json.dumps(settings))

    def _probe_outputs(self) -> None:
        """Note the model's final output for the probe, for verification."""
        self._restore_outer()
        _, output = next(self.stream.outputs(self.stream.lanes["probe"]))
        save_tensors(self.scratch / "logits.safetensors", {"logits": output[0].cpu()})
        self._release_outer()

    def _save(self, started: float) -> None:
        """Note what is finished: the lanes first, then the state that says so."""
        state = self.state
        state["edits"] = [edit.to_json() for edit in self.record.edits]
        state["linears"], state["notes"] = self.record.linears, self.record.notes
        state["tails"] = self.stream.tails
        state["seconds"] += time.process_time() - started
        name = f"lanes-{state['blocks']}.safetensors"
        save_tensors(self.scratch / name, self._lane_tensors())
        previous, state["lanes"] = state.get("lanes"), name
        self.work.save()
        if previous and previous != name:
            (self.scratch / previous).unlink(missing_ok=True)

    def _lane_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for which, stream in enumerate(self._streams):
            for lane in stream.lanes.values():
                for place_, chunks in {"": lane.hidden, **lane.finished}.items():
                    for index, hidden in enumerate(chunks):
                        tensors[f"{which}/{lane.name}/{place_}/{index}"] = hidden
        return tensors

    def _load_lanes(self) -> None:
        """Put the lanes of an earlier run back to where they were."""
        if "lanes" not in self.state:
            return
        for stream in self._streams:
            stream.tails = dict(self.state["tails"])
        tensors = load_tensors(self.scratch / self.state["lanes"])
        for key in sorted(tensors, key=lambda key: int(key.rpartition("/")[2])):
            which, name, place_, _ = key.split("/")
            lane = self._streams[int(which)].lanes[name]
            chunks = lane.finished.setdefault(place_, []) if place_ else lane.hidden
            chunks.append(tensors[key].to(self.options.device))


def recorded(state: dict[str, Any], survey: dict[str, Tensor]) -> StepRecord:
    """What a pass did so far, of its state in the work folder."""
    return StepRecord([parse_edit(edit) for edit in state["edits"]], state["linears"], state["notes"], survey)


def _outer_names(stream: BlockStream, tied: bool = False) -> list[str]:
    """Names of the parameters outside the blocks, of tied ones all names if so asked."""
    stacks = tuple(f"{stack.name}." for stack in stream.anatomy.stacks)
    named = stream.model.named_parameters(remove_duplicate=not tied)
    return [name for name, _ in named if not name.startswith(stacks)]


def probe_tokens(model: Any, seed: int) -> Tensor:
    """One window of random tokens: any text will do to compare a model with itself."""
    vocabulary = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, min(PROBE_TOKENS, limit)), generator=generator)
