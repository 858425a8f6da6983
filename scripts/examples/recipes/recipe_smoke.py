"""Does every recipe that needs no hub and no judge run with its default options? A few small steps of each tell.

Beside the model, paths and sizes the options are the recipe's own; `loss_fn` and `max_steps_off_policy` are what some
entries are about. The server of these runs maps stable_reinforce, the default of several. On a Qwen3.5 the renderer,
too, is the recipe's or the cookbook's own, and so are teachers and graders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipe_bench import Bench, RecipeError, probe, run_recipe
from recipe_data import read_lines
from recipe_family import FAMILIES

NLL, REWARD = "train_mean_nll", "env/all/reward/total"
# Seconds; a recipe that takes longer hangs.
LIMIT = 900
# A copy of the model whose context the default max_tokens of preference.shorter fills: its prompt and 64 tokens.
SHORT, SHORT_PROMPT, SHORT_ANSWER = "local/SmolLM2-short", 13, 64
MAPPED = ("--map-loss", "stable_reinforce=importance_sampling")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a recipe is called, and what it must write.

    Attributes:
        module: below tinker_cookbook.recipes.
        metric: a key of metrics.jsonl, in the row of each step.
        options: beside model, renderer and log.
        models: options that name models and their renderers, where the recipe's own are not served.
        steps: how many it takes.
        model: what the recipe is told; None for that of the family, "" for nothing.
        minimal: takes neither a renderer nor what to do about an earlier log.
        logs_answers: writes the metrics of the server's answers too.
        skips_equal: does not train on a group whose answers are all equally good.
    """

    module: str
    metric: str
    options: dict[str, Any]
    models: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    model: str | None = None
    minimal: bool = False
    logs_answers: bool = True
    skips_equal: bool = False


def _math(**options: Any) -> Recipe:
    return Recipe(module="math_rl.train", metric=REWARD, options={"groups_per_batch": 2, **options})


_SMOLLM2 = FAMILIES["smollm2"]
_DISTILLED = {"group_size": 2, "max_tokens": 16}
RECIPES: dict[str, Recipe] = {
    "chat_sl": Recipe(module="chat_sl.train", metric=NLL, options={"batch_size": 8}),
    "sl_loop": Recipe(module="sl_loop", metric=NLL, options={"batch_size": 8}, minimal=True),
    "rl_loop": Recipe(
        module="rl_loop",
        metric="reward/total",
        options={"batch_size": 4, "group_size": 16, "max_tokens": 64},
        minimal=True,
        skips_equal=True,
    ),
    "math_rl": _math(),
    "math_rl_importance_sampling": _math(loss_fn="importance_sampling"),
    "math_rl_ppo": _math(loss_fn="ppo"),
    "math_rl_cispo": _math(loss_fn="cispo"),
    "math_rl_gspo": _math(loss_fn="gspo"),
    "math_rl_async": _math(max_steps_off_policy=1),
    "dpo": Recipe(module="preference.dpo.train", metric="dpo_loss", options={"batch_size": 4}, logs_answers=False),
    "on_policy_distillation": Recipe(
        module="distillation.on_policy_distillation",
        metric="teacher_kl",
        options={"groups_per_batch": 2, **_DISTILLED},
        models={"teacher_model": _SMOLLM2.model},
    ),
    "on_policy_multi_teacher": Recipe(
        module="distillation.on_policy_multi_teacher",
        metric="teacher_kl",
        options={"deepmath_groups_per_batch": 2, "tulu3_groups_per_batch": 2, **_DISTILLED},
        models={"deepmath_teacher_model": _SMOLLM2.model, "tulu3_teacher_model": _SMOLLM2.known},
    ),
    "off_policy_reasoning": Recipe(
        module="distillation.off_policy_reasoning",
        metric=NLL,
        options={"batch_size": 8, "buffer_size": 16, "max_prompts": 48},
    ),
    "sdft": Recipe(
        module="sdft.train",
        metric="sdft/num_datums",
        # The recipe's evaluation fails by itself: its evaluator takes the triples of its own test set for groups.
        options={"groups_per_batch": 2, "max_tokens": 16, "eval_every": 0},
    ),
    "prompt_distillation": Recipe(
        module="prompt_distillation.train",
        metric=NLL,
        options={"file_path": "languages.jsonl", "batch_size": 4},
    ),
    "guess_number": Recipe(
        module="multiplayer_rl.guess_number.train",
        metric=REWARD,
        # Its evaluation plays 103 numbers, whatever is asked for.
        options={"batch_size": 2, "group_size": 2, "max_tokens": 16, "eval_every": 0},
    ),
    "text_arena": Recipe(
        module="multiplayer_rl.text_arena.train",
        metric=REWARD,
        options={"batch_size": 4, "num_train_datapoints": 8, "num_test_datapoints": 2},
    ),
    "rubric": Recipe(
        module="rubric.train",
        metric=REWARD,
        # Each answer is graded with up to 2,048 tokens, which SmolLM2 does not end by itself; an evaluation grades all
        # of the test set.
        options={"groups_per_batch": 1, "train_group_size": 2, "eval_every": 0},
        models={"grader_llm_name": _SMOLLM2.model, "grader_renderer_name": _SMOLLM2.renderer},
    ),
}
# What only a Qwen3.5 is tried on: recipes that take the renderers of no other, and other names of such models.
QWEN3_5: dict[str, Recipe] = {
    "chat_sl_base": Recipe(module="chat_sl.train", metric=NLL, options={"batch_size": 8}, model=""),
    "chat_sl_variant": Recipe(
        module="chat_sl.train", metric=NLL, options={"batch_size": 8}, model="Qwen/Qwen3.6-27B:peft:262144"
    ),
    "chat_sl_preserve_thinking": Recipe(
        module="chat_sl.train",
        metric=NLL,
        options={"batch_size": 8, "renderer_name": "qwen3_5_preserve_thinking"},
    ),
    "shorter": Recipe(module="preference.shorter.train", metric=REWARD, options={"batch_size": 2, "group_size": 4}),
    "twenty_questions": Recipe(
        module="multiplayer_rl.twenty_questions.train",
        metric=REWARD,
        # Its evaluation plays 34 words 32 times each.
        options={"batch_size": 2, "group_size": 2, "eval_every": 0},
    ),
}


def _options(bench: Bench, recipe: Recipe, name: str) -> dict[str, Any]:
    models = bench.models
    options = {**recipe.options, "max_steps": recipe.steps, "log_path": f"runs/{name}"}
    if models.renderer is not None:
        options |= recipe.models
    if recipe.model != "":
        options["model_name"] = recipe.model or (models.known if recipe.minimal else models.model)
    if not recipe.minimal:
        options["behavior_if_log_dir_exists"] = "delete"
        if models.renderer is not None:
            options["renderer_name"] = models.renderer
    return options


def smoke(bench: Bench, name: str) -> None:
    """Run a recipe of the table and check what it wrote.

    Raises:
        RecipeError: it ended with an error, or took too long.
    """
    _run(bench, name, RECIPES.get(name) or QWEN3_5[name])


def _run(bench: Bench, name: str, recipe: Recipe) -> None:
    run_recipe(bench, name, recipe.module, _options(bench, recipe, name), recipe.metric, limit=LIMIT)
    rows = read_lines(bench.work / "runs" / name / "metrics.jsonl")
    steps = sum(recipe.metric in row for row in rows)
    bench.check(name, f"steps with {recipe.metric}", f"{recipe.steps}", steps, steps == recipe.steps)
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    wrong = sum(not math.isfinite(value) for value in numbers)
    bench.check(
        name, f"of {len(numbers)} numbers in metrics.jsonl, not finite", "0", wrong, bool(numbers) and not wrong
    )
    if recipe.logs_answers:
        most = max((row.get("step:max", 0.0) for row in rows), default=0.0)
        none = recipe.skips_equal and bench.models.random
        right = most == 0 if none else most >= 1
        bench.check(name, "optimizer steps that the server has answered", "0" if none else ">= 1", most, right)


def create_data(bench: Bench) -> None:
    """Let the teacher whom prompt distillation names, here an alias of the model, label sentences."""
    path = "runs/create_data/languages.jsonl"
    options = {"output_file": path}
    run_recipe(bench, "create_data", "prompt_distillation.create_data", options, "", limit=LIMIT)
    said = f"Saved data to {path}" in (bench.out / "logs" / "create_data.log").read_text()
    written = said and (bench.work / path).is_file()
    bench.check(
        "create_data", "says that its file is written, and it is there", "yes", "yes" if written else "no", written
    )


def download(bench: Bench) -> None:
    """Download the weights that chat_sl has saved, with the cookbook's weights.download."""
    checkpoints = bench.work / "runs" / "chat_sl" / "checkpoints.jsonl"
    if not read_lines(checkpoints):
        smoke(bench, "chat_sl")
    state = read_lines(checkpoints)[-1]["state_path"]
    found = probe(bench, "download", "--state", state, "--folder", "runs/download")
    bench.seconds["download"] = bench.seconds.pop("probe download")
    whole = found["rank"] == 32 and found["tensors"] > 0 and bool(found["finite"])
    shown = f"{found['tensors']} tensors, rank {found['rank']}, finite: {found['finite']}"
    bench.check("download", "adapter of rank 32, finite", "yes", shown, whole)
    trained = found["trained"]
    bench.check("download", "of its B, not zero", "1", trained, trained == 1)


def refused(bench: Bench) -> None:
    """Run math_rl with its default loss on a server without --map-loss: it must end at once and say what to do."""
    name = "math_rl_refused"
    recipe = Recipe(module="math_rl.train", metric=REWARD, options={"groups_per_batch": 2}, model=SHORT)
    log = bench.out / "logs" / f"{name}.log"
    try:
        run_recipe(bench, name, recipe.module, _options(bench, recipe, name), recipe.metric, limit=LIMIT)
        ended = "without an error"
    except RecipeError as error:
        ended = "by the limit" if "was killed" in str(error) else "with an error"
    bench.check(name, "ends", "with an error", ended, ended == "with an error")
    named = "loss_fn=importance_sampling" in log.read_text(errors="replace")
    bench.check(name, "says loss_fn=importance_sampling", "yes", "yes" if named else "no", named)
    steps = len(read_lines(bench.work / "runs" / name / "metrics.jsonl"))
    bench.check(name, "steps before it ended", "0", steps, steps == 0)


def vision(bench: Bench) -> None:
    """Ask for a classifier of pictures: it must end at the first one, and say that only text is read."""
    name = "vision"
    options = {"experiment_dir": f"runs/{name}", "model_name": bench.models.model, "batch_size": 2, "max_steps": 2}
    try:
        run_recipe(bench, name, "vlm_classifier.train", options, NLL, limit=LIMIT)
        ended = "without an error"
    except RecipeError as error:
        ended = "by the limit" if "was killed" in str(error) else "with an error"
    bench.check(name, "ends", "with an error", ended, ended == "with an error")
    said = "is of type 'image'; only text is read here" in (bench.out / "logs" / f"{name}.log").read_text()
    bench.check(name, "says that only text is read", "yes", "yes" if said else "no", said)
    rows = [row for file in (bench.work / "runs" / name).rglob("metrics.jsonl") for row in read_lines(file)]
    steps = sum(NLL in row for row in rows)
    bench.check(name, "steps before it ended", "0", steps, steps == 0)


def shorter(bench: Bench) -> None:
    """Reinforce short answers where prompt and max_tokens are all of the context, and each answer is scored again."""
    name = "shorter_full_context"
    recipe = Recipe(
        module="preference.shorter.train", metric=REWARD, options={"batch_size": 2, "group_size": 4}, model=SHORT
    )
    _run(bench, name, recipe)
    summaries = (bench.work / "runs" / name).glob("iteration_*/train_rollout_summaries.jsonl")
    turns = [turn for file in summaries for row in read_lines(file) for turn in row["steps"]]
    lengths = [turn["ob_len"] + turn["ac_len"] for turn in turns]
    full = sum(length == SHORT_PROMPT + SHORT_ANSWER for length in lengths)
    bench.check(name, f"of {len(lengths)} answers, fill the context", ">= 1", full, full >= 1)


# On the server that maps the loss: what is more than an entry of the table.
MORE: dict[str, Callable[[Bench], None]] = {"create_data": create_data, "download": download}
MORE_QWEN3_5: dict[str, Callable[[Bench], None]] = {**MORE, "vision": vision}
# On a server that does not, with the short model.
PLAIN: dict[str, Callable[[Bench], None]] = {"math_rl_refused": refused, "shorter_full_context": shorter}
