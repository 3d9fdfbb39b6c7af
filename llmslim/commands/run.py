"""The verbs that change a model: one step by its flags (`quantize`, ...), or a recipe (`compress`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslim.commands.common import MODEL, add_device, add_model, show
from llmslim.errors import UserError, nearest
from llmslim.flags import Parser, add_field, default_text, merged

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmslim.plan import Plan
    from llmslim.recipe import Recipe
    from llmslim.step import Step

STEP, RECIPE = "step.", "recipe."  # destinations of flags that set a field of a step, or of the recipe
STUDENT = "student."  # of the step `student` in front
TEACHING = ("distill", "finetune")  # verbs that have that

SECTIONS = {  # flags of the recipe's fields, by where the value goes
    "calibration.text": "--calibration",
    "calibration.num_samples": "--num-samples",
    "calibration.seq_len": "--seq-len",
    "seed": "--seed",
    "format": "--format",
    "dtype": "--dtype",
    "evaluation.text": "--evaluate",
    "evaluation.windows": "--eval-windows",
    "evaluation.seq_len": "--eval-seq-len",
    "evaluation.join": "--eval-join",
    "evaluation.tasks": "--eval-tasks",
    "evaluation.tasks_limit": "--eval-limit",
    "evaluation.tasks_data": "--eval-data",
    "evaluation.glue": "--eval-glue",
    "evaluation.glue_subset": "--eval-subset",
    "evaluation.glue_data": "--eval-glue-data",
    "evaluation.steps": "--measure-steps",
}


def step_parser(prog: str, verb: str) -> Parser:
    """The parser of a verb that runs one step."""
    methods = methods_of(verb)
    width = max(8, *map(len, methods))
    lines = "\n".join(f"{kind:<{width}} {_first_sentence(cls)}" for kind, cls in methods.items())
    made = Parser(prog, _room_text(methods, verb), _examples(prog, verb, methods))
    made.set_defaults(verb=verb)
    add_model(made)
    chosen = made.add_argument_group("methods", lines)
    chosen.add_argument("--method", metavar="|".join(methods), help="which one")
    for kinds, names in _by_methods(methods).items():
        group = made.add_argument_group(_title(kinds, methods))
        for name in names:
            field = merged({kind: methods[kind].model_fields[name] for kind in kinds})
            add_field(group, STEP + name, field, default=_default(methods, kinds, name))
    if verb in TEACHING:
        _add_student_flags(made)
    _add_run_flags(made)
    return made


def _add_student_flags(parser: Parser) -> None:
    from llmslim.step import step_class

    about = "build the student from MODEL first, as `prune --method student` does; without them MODEL is the student"
    group = parser.add_argument_group("options of the student", about)
    for name, field in step_class("student").model_fields.items():
        add_field(group, STUDENT + name, field, flag=f"--student-{name.replace('_', '-')}")


def _title(kinds: tuple[str, ...], methods: dict[str, type[Step]]) -> str:
    """Whose options these are, in the fewest words."""
    others = [kind for kind in methods if kind not in kinds]
    if not others:
        return "options of every method"
    if len(others) < len(kinds) / 2:
        return f"options of every method but {' and '.join(others)}"
    return f"options of {' and '.join(kinds)} alone"


def recipe_parser(prog: str) -> Parser:
    """The parser of `compress`."""
    made = Parser(
        prog,
        "Run the steps of a recipe, in order, on a model. KEY=VALUE changes one value of the recipe.",
        "a recipe:\n"
        "  steps:\n"
        "    - gptq: {bits: 4, group_size: 64}\n"
        "  calibration: {text: builtin, num_samples: 32, seq_len: 512}\n\n"
        "examples:\n"
        f"  {prog} demo configs/recipe.yaml --output out/demo\n"
        f"  {prog} demo configs/recipe.yaml gptq.bits=3 calibration.num_samples=8 --output out/demo",
    )
    add_model(made)
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as those in configs/")
    made.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as gptq.bits=3")
    _add_run_flags(made)
    return made


def _add_run_flags(parser: Parser) -> None:
    from llmslim.recipe import Calibration, Evaluation, Recipe

    sections: dict[str, type[BaseModel]] = {"calibration": Calibration, "evaluation": Evaluation}
    group = parser.add_argument_group("options of the run")
    group.add_argument("--output", metavar="FOLDER", help="where the result goes; must not exist")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the output, discard an unfinished run"
    )
    group.add_argument(
        "--plan", action="store_true", help="print memory, time, disk and format needed, and stop"
    )
    for path, flag in SECTIONS.items():
        section, _, name = path.rpartition(".")
        cls = sections[section] if section else Recipe
        add_field(group, RECIPE + path, cls.model_fields[name], flag=flag)
    skip: dict[str, Any] = {"dest": RECIPE + "evaluation", "action": "store_const", "const": None}
    group.add_argument(
        "--no-evaluate", **skip, help="measure sizes only (the result is verified all the same)"
    )
    speed: dict[str, Any] = {"dest": RECIPE + "evaluation.speed", "action": "store_const", "const": False}
    group.add_argument("--no-speed", **speed, help="do not measure speed and memory of base and result")
    group.add_argument("--push", metavar="USER/NAME", help="publish the result on the Hub, as `llmslim push`")
    group.add_argument("--private", action="store_true", help="with --push: make the repository private")
    add_device(group)


def methods_of(verb: str) -> dict[str, type[Step]]:
    """The steps that a verb offers, by name."""
    from llmslim.step import STEPS, load_steps

    load_steps()
    return {kind: STEPS[kind] for kind in sorted(STEPS) if STEPS[kind].verb == verb}


def run_step(options: dict[str, Any]) -> None:
    """Run a verb of one step."""
    from llmslim.recipe import Recipe

    verb = options["verb"]
    kind = _method(options.get("method"), methods_of(verb))
    fields = _below(options, STEP)
    _refuse_foreign(fields, kind, methods_of(verb))
    student = _below(options, STUDENT)
    record: dict[str, Any] = {"steps": [*([{"student": student}] if student else []), {kind: fields}]}
    for path, value in _recipe_fields(options).items():
        section, _, name = path.rpartition(".")
        (record.setdefault(section, {}) if section else record)[name] = value
    _compress(Recipe.parse(record), options)


def run_recipe(options: dict[str, Any]) -> None:
    """Run `compress`."""
    from llmslim.recipe import Recipe

    flags = [
        f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in _recipe_fields(options).items()
    ]
    _compress(Recipe.read(Path(options["recipe"]), [*options.get("overrides", []), *flags]), options)


def _below(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}


def _recipe_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that were typed, by their path."""
    fields = _below(options, RECIPE)
    about = [path for path in fields if path.startswith("evaluation.")]
    if "evaluation" in fields and about:
        flag = SECTIONS.get(about[0], "--no-speed")
        raise UserError(f"{flag} and --no-evaluate exclude each other: leave one out.")
    return fields


def _compress(recipe: Recipe, options: dict[str, Any]) -> None:
    from llmslim import pipeline
    from llmslim.prepare import prepare
    from llmslim.progress import progress_for
    from llmslim.report import plan_table, summary_table
    from llmslim.work import check_output

    _refuse_unread(recipe, options)
    device = options.get("device")
    model, revision = options["model"], options.get("revision")
    if options.get("plan"):
        output = Path(options["output"]) if "output" in options else None
        if output is not None:
            check_output(output, options.get("overwrite", False))
        prepared = prepare(model, recipe, revision=revision, device=device, plan_only=True)
        if output is not None:
            prepared.plan.require_disk(output)
        show(plan_table(prepared.plan))
        return
    if "output" not in options:
        raise UserError(
            "Where should the result go? Give --output FOLDER (or --plan to see what it would take)."
        )
    target, private = options.get("push"), options.get("private", False)
    if private and not target:
        raise UserError("--private is about the repository of --push USER/NAME: leave it out, or give both.")
    if target:
        from llmslim.hub import check_target

        check_target(target, private)  # before hours of work
    with progress_for() as progress:
        result = pipeline.compress(
            model,
            recipe,
            options["output"],
            revision=revision,
            overwrite=options.get("overwrite", False),
            device=device,
            progress=progress,
            on_plan=lambda plan: print(plan_line(plan), file=sys.stderr, flush=True),
        )
    show(summary_table(result.report))
    print(f"Saved to {result.folder}, with a report (report.html, .md, .json) and a model card (README.md).")
    if target:
        _push(result.folder, target, private)


def _refuse_unread(recipe: Recipe, options: dict[str, Any]) -> None:
    """Refuse a text that was typed and no step looks at; a recipe's own the plan only tells of: others share it."""
    typed = [SECTIONS[path] for path in _recipe_fields(options) if path.startswith("calibration.")]
    if typed and not recipe.reads_text:
        kinds = " and ".join(dict.fromkeys(step.kind for step in recipe.steps))
        raise UserError(
            f"{' and '.join(typed)} would change nothing: {kinds} with these options looks at no text; leave "
            f"{'it' if len(typed) == 1 else 'them'} out."
        )


def _push(folder: Path, target: str, private: bool) -> None:
    from llmslim.commands.push import told
    from llmslim.hub import push

    try:
        print(told(push(folder, target, private=private)))
    except UserError as error:
        option = " --private" if private else ""
        raise UserError(
            f"{error} The result is saved: `llmslim push {folder} {target}{option}` tries again."
        ) from error


def plan_line(plan: Plan) -> str:
    """The plan in one line, for the start of a run; what was chosen comes in lines in front."""
    from llmslim.work import duration

    chosen = "".join(f"{told}\n" for told in plan.chosen)
    return (
        f"{chosen}plan: {plan.blocks} blocks, {plan.linears} edits, {plan.input_bytes / 1e6:,.0f} MB -> "
        f"{plan.output_bytes / 1e6:,.0f} MB ({plan.format}); peak memory {plan.peak_memory / 1e9:.2f} GB "
        f"of {plan.available_memory / 1e9:.1f} GB, about {duration(plan.seconds)}"
    )


def _method(typed: str | None, methods: dict[str, type[Step]]) -> str:
    if typed in methods:
        return typed
    if typed is None and len(methods) == 1:
        return next(iter(methods))
    if typed is None:
        raise UserError(f"Which method? Give --method {' or '.join(methods)}; --help says what each does.")
    raise UserError(f"Unknown method {typed!r}{nearest(typed, methods)}; there are {', '.join(methods)}.")


def _refuse_foreign(fields: dict[str, Any], kind: str, methods: dict[str, type[Step]]) -> None:
    """Refuse options of another method than the chosen one."""
    taken = methods[kind].model_fields
    for name in fields:
        if name not in taken:
            owners = " and ".join(other for other, cls in methods.items() if name in cls.model_fields)
            raise UserError(
                f"--{name.replace('_', '-')} is an option of {owners}, not of {kind}: leave it out, "
                f"or choose --method {owners.split()[0]}."
            )


def _by_methods(methods: dict[str, type[Step]]) -> dict[tuple[str, ...], list[str]]:
    """Field names, grouped by which methods have them; what all have comes first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for cls in methods.values():
        for name in cls.model_fields:
            kinds = tuple(kind for kind, other in methods.items() if name in other.model_fields)
            names = groups.setdefault(kinds, [])
            names.append(name) if name not in names else None
    return dict(sorted(groups.items(), key=lambda entry: (-len(entry[0]), entry[0])))


def _default(methods: dict[str, type[Step]], kinds: tuple[str, ...], name: str) -> str:
    """The default of a field, per method where they differ."""
    texts = {
        kind: default_text(methods[kind].model_fields[name].get_default(call_default_factory=True))
        for kind in kinds
    }
    values = list(dict.fromkeys(texts.values()))
    return (
        values[0]
        if len(values) == 1
        else ", ".join(f"{kind}: {text or 'none'}" for kind, text in texts.items())
    )


def _first_sentence(cls: type[Step]) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


def _room_text(methods: dict[str, type[Step]], verb: str) -> str:
    """What the room of the methods says of itself, or else the verb."""
    import importlib

    rooms = [importlib.import_module(cls.__module__.rpartition(".")[0]) for cls in methods.values()]
    return next((room.__doc__ for room in rooms if room.__doc__), verb)


def _examples(prog: str, verb: str, methods: dict[str, type[Step]]) -> str:
    lines = [f"  {prog} demo --method {kind} --output out/{kind}" for kind in methods]
    first = next(iter(methods))
    return "\n".join(
        [
            f"MODEL is {MODEL}. A text is NAME[:CONFIG[:SPLIT]] (a data set of the",
            "Hub or a local folder in its layout), a .txt, .jsonl or .parquet file, or builtin. A killed",
            "run goes on when the same command is given again.",
            "",
            "examples:",
            *lines,
            f"  {prog} Qwen/Qwen3-0.6B --method {first} --plan",
        ]
    )
