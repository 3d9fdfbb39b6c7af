"""Make small compressed checkpoints for tests, with what verification wants to know of their making.

As a script it loads checkpoints in a process of its own: `python -m tests.checkpoints HOW JOB`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]


class Made(NamedTuple):
    """What a run left: folder and report, and what a fresh process found when it verified the folder."""

    folder: Path
    report: dict[str, Any]
    verification: dict[str, Any]


@torch.no_grad()
def make(
    source: Path, folder: Path, step: Any, form: str = "auto", dtype: torch.dtype = torch.float32
) -> Any:
    """Compress `source` to `folder`, with a probe in `<folder>-probe` beside it; returns the filled model."""
    from llmslim.anatomy import Anatomy
    from llmslim.calibration.stream import BlockStream, Lane
    from llmslim.checkpoint.formats import choose
    from llmslim.checkpoint.reader import CheckpointReader
    from llmslim.checkpoint.writer import CheckpointWriter
    from llmslim.loaders.models import find
    from llmslim.step import StepRecord

    files = find(str(source))
    reader = CheckpointReader(files)
    model, record = reader.model_skeleton(), StepRecord()
    stream = BlockStream(model, torch.device("cpu"), torch.float32)
    chosen = choose(form, step.planned_edits(Anatomy(model)), reader.model_skeleton(), dtype)
    probe = folder.with_name(f"{folder.name}-probe")
    folder.mkdir()
    probe.mkdir()
    writer = CheckpointWriter(folder, chosen, dtype)
    tokens = torch.randint(5, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    lane = Lane.of_tokens("probe", tokens, bool(model.config.is_encoder_decoder))
    stream.add(lane)
    reader.fill([model], None, torch.float32, round_to=dtype)
    step.compress_outer(stream, record)
    writer.write_outer(model)
    for stack in stream.anatomy.stacks:
        for block in stack.blocks:
            reader.fill([model], block.name, torch.float32, round_to=dtype)
            if block.index == 0:
                stream.enter(stack)
            step.compress_block(block, stream, None, record)
            stream.forward(block, lane)
            save_file({"hidden": torch.cat(lane.hidden)}, probe / f"block-{block.name}.safetensors")
            writer.write_block(model, block.name)
        stream.leave(stack)
    writer.finish(files, record.edits)
    _, output = next(stream.outputs(lane))
    save_file({"tokens": tokens}, probe / "tokens.safetensors")
    save_file({"logits": output[0]}, probe / "logits.safetensors")
    (probe / "probe.json").write_text(json.dumps({"dtype": "float32", "source": str(source)}))
    return model


def compress_many(jobs: dict[str, tuple[Path, list[Any]]], root: Path, **fields: Any) -> dict[str, Made]:
    """Run recipes, by name of their output in `root`, and verify all of them in one fresh process.

    Args:
        jobs: name -> (folder of the model, steps as in a recipe).
        fields: of the recipe.
    """
    from unittest.mock import patch

    from llmslim import pipeline
    from llmslim.recipe import Recipe

    reports = {}
    for name, (source, steps) in jobs.items():

        def keep(folder: Path, made: Path, probe: Path = root / f"probe-{name}") -> dict[str, Any]:
            shutil.copytree(made, probe)
            return {"ok": True, "checks": []}

        with patch.object(pipeline, "verify_in_fresh_process", keep):
            recipe = Recipe.parse({"steps": steps, **fields})
            reports[name] = pipeline.compress(str(source), recipe, root / name).report
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from llmslim.checkpoint.verify import verify\n"
        "print(json.dumps([verify(f, Path(f).parent / f'probe-{Path(f).name}') for f in sys.argv[1:]]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", script, *(str(root / name) for name in jobs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {n: Made(root / n, reports[n], checks) for n, checks in zip(jobs, found, strict=True)}


def inputs_of(model: Any) -> dict[str, Tensor]:
    from tests.tiny import example_inputs

    return example_inputs(model)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(**inputs_of(model))[0]


@torch.no_grad()
def dense_logits_of(model: Any) -> Tensor:
    """The logits with every packed Linear replaced by the dense one that it stands for, in place."""
    from llmslim.edit import replace_module
    from llmslim.quantization.packed import PackedLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.copy_(module.quantized().dequantize())
            linear.bias = module.bias
            replace_module(model, name, linear)
    return logits_of(model)


def load_elsewhere(how: str, folders: dict[str, Path], scratch: Path) -> dict[str, Tensor]:
    """The logits of checkpoints that another process loads by "llmslim", "plugin" or plain "transformers"."""
    job, result = scratch / f"{how}.json", scratch / f"{how}.safetensors"
    job.write_text(json.dumps({"folders": {k: str(v) for k, v in folders.items()}, "result": str(result)}))
    command = [sys.executable, "-m", "tests.checkpoints", how, str(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(result)


def _child(how: str, job: dict[str, Any]) -> None:
    import transformers

    logits = {}
    for name, folder in job["folders"].items():
        if how == "llmslim":
            from llmslim.checkpoint.load import load

            model, _ = load(folder, dtype=torch.float32)
        else:
            if how == "plugin":
                import llmslim.plugin  # noqa: F401
            config = transformers.AutoConfig.from_pretrained(folder)
            cls = getattr(transformers, config.architectures[0])
            model = cls.from_pretrained(folder, dtype=torch.float32)
        logits[name] = logits_of(model).clone()
    assert ("llmslim" in sys.modules) == (how != "transformers")
    save_file(logits, job["result"])


@contextmanager
def killed_at_training_step(step: int, monkeypatch: Any) -> Iterator[None]:
    """Training that runs inside is interrupted behind that optimizer step, and must be."""
    import pytest

    from llmslim.training.watch import Watch

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def outlook(family: str, **overrides: Any) -> Any:
    """What steps are settled by, of a tiny model with nothing done to it."""
    from llmslim.checkpoint.formats import choose
    from llmslim.loaders.models import skeleton
    from llmslim.outlook import Foresight
    from tests.tiny import tiny_config

    model = skeleton(tiny_config(family, **overrides))
    return Foresight(model, (), lambda edits: choose("auto", edits, model), torch.float32)


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
