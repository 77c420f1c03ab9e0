"""Learning without a reward: the experiment of the improvement-model paper at small scale, and models as
their own judges.

    .venv/bin/python benchmarks/without_reward.py                                  # every arm and seed: 36
    jobs of up to four minutes .venv/bin/python benchmarks/without_reward.py --seeds 0 --arms base
    diffusion_dpo spin .venv/bin/python benchmarks/without_reward.py --pictures                       #
    finished arms of seed 0, side by side .venv/bin/python benchmarks/without_reward.py --markdown
    # no runs: tables into docs/without_reward.md

Every arm starts from the embedded diffusion model and spends 14,208 network evaluations on drawing, improving
and training (a self-judge's own evaluations come on top, as those of any judge do; the table lists them). The
training judge labelled the offline pairs; only `expo_judge` uses it besides. Arms:

base                    the model as it is
diffusion_dpo           Diffusion-DPO on the offline pairs
spin                    images of the data win against the model's own
improver                the improvement model, trained once a seed on the offline pairs (23,040 evaluations,
on top of the budget); its own
                        row is what it makes of the base's images
improvement_dpo         iterative DPO with it, 288 online pairs; _96 and _32 are the same with fewer pairs and
as many steps improvement_after_spin  the same 288 pairs, starting from what `spin` gave, as the paper does
expo_judge              EXPO, the training judge ranks: the only arm with a reward
expo_implicit           EXPO, the model of `diffusion_dpo` ranks by its implicit reward
expo_denoising          EXPO, the base ranks by how much the prompt helps it to denoise
agreement               no model: how far the self-judges and the two judges order the base's images alike

Arms that need another (`improvement_*` the improver, `improvement_after_spin` spin, `expo_implicit` and
`agreement` diffusion_dpo) run it first. Each draws all 972 held-out and 576 training prompts once, and 24 of
each eight times for the Vendi score; the same prompts and noise for all arms and seeds. Finished jobs are
read, others resumed. Written to benchmarks/results/without_reward.json and docs/images/without_reward.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from diffexpo.assembly.actions import load_weights, open_run
from diffexpo.assembly.aliases import named_prompts, resolve
from diffexpo.assembly.improving import restore_improver
from diffexpo.assembly.objects import build_policy
from diffexpo.assembly.self_judges import open_denoiser
from diffexpo.config import RunConfig, load_config
from diffexpo.config.rewards import SelfJudgeConfig, read_card
from diffexpo.config.schema import SamplerConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.evaluation.grid import image_grid
from diffexpo.evaluation.metrics import bootstrap_mean, vendi_score, win_rate
from diffexpo.evaluation.suites import choose_prompts
from diffexpo.online.stages.improve import double_guidance_of, improve_latents, improver_sampler
from diffexpo.online.units import draw_latents
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.images import quantise, to_bytes
from diffexpo.rewards.scoring import score_drawn
from diffexpo.training.metrics import read_metrics
from diffexpo.types import Drawn, Policy, Prompt

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "without_reward.md"
BUDGET = 14_208
STEP = 48 * 8  # network evaluations of a step on 48 pairs
SAMPLER = SamplerConfig(name="dpmpp", steps=5, guidance=1.0)
# The prompts and the noise of the evaluation are the same for every arm and seed.
EVALUATION_SEED = 0
SETS = {"train": "emoji:train", "heldout": "emoji:heldout"}
JUDGES = ("judge_heldout", "judge_train")
BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """How many prompts and images are looked at in the end."""

    train: int = 576
    heldout: int = 972
    vendi_prompts: int = 24
    vendi_images: int = 8
    agreement_prompts: int = 64
    agreement_images: int = 8
    resamples: int = 10_000


TINY = Sizes(8, 8, 2, 3, 3, 3, 200)
TINY_SETTINGS = (
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "training.steps=2",
    "explore.prompts_per_iteration=3",
    "offline.limit=16",
)
TINY_IMPROVER = ("steps=2", "batch_size=4", "micro_batch_size=4")

# Each run evaluates next to nothing itself; `examine` does it for all arms alike.
COMMON = (
    "evaluation.num_prompts=8",
    "evaluation.every_iteration=false",
    "evaluation.kl_prompts=0",
    "evaluation.vendi_prompts=0",
    "evaluation.grid_prompts=4",
    "training.batch_size=48",
    "training.micro_batch_size=48",
    "training.learning_rate=7e-6",
    "training.ema_decay=0.95",
    "baseline.offline_dpo=false",
)
SELF_JUDGE = '"self_judge": {"draws": 4, "timestep_range": [0.3, 1.0], "beta": 1000.0}'
DENOISING = '"self_judge": {"draws": 4, "timestep_range": [0.3, 1.0]}'
EXPO = ("explore.prompts_per_iteration=48", "training.steps=9")


def improving(prompts: int) -> tuple[str, ...]:
    """Two rounds of 2 x `prompts` images each; as many steps whatever the number."""
    return (f"explore.prompts_per_iteration={prompts}", "training.steps=11", "rewards=[]")


# Arm -> (recipe, settings, arms that it needs). {NAME} stands for the folder of arm NAME with the same seed.
ARMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "base": ("", (), ()),
    "diffusion_dpo": ("dpo_offline", ("training.steps=37", "rewards=[]"), ()),
    "spin": ("spin", ("explore.prompts_per_iteration=96", "training.steps=16", "rewards=[]"), ()),
    "improver": ("improvement_dpo", ("rewards=[]",), ()),
    "improvement_dpo": (
        "improvement_dpo",
        (*improving(72), "algorithm.improver.path={improver}/improver"),
        ("improver",),
    ),
    "improvement_dpo_96": (
        "improvement_dpo",
        (*improving(24), "algorithm.improver.path={improver}/improver"),
        ("improver",),
    ),
    "improvement_dpo_32": (
        "improvement_dpo",
        (*improving(8), "algorithm.improver.path={improver}/improver"),
        ("improver",),
    ),
    "improvement_after_spin": (
        "improvement_dpo",
        (*improving(72), "algorithm.improver.path={improver}/improver", "tuning.start={spin}"),
        ("improver", "spin"),
    ),
    "expo_judge": ("expo", EXPO, ()),
    "expo_implicit": (
        "expo_implicit",
        (
            *EXPO,
            (
                f'rewards=[{{"name": "implicit", "type": "implicit", "path": "{{diffusion_dpo}}", '
                f"{SELF_JUDGE}}}]"
            ),
        ),
        ("diffusion_dpo",),
    ),
    "expo_denoising": (
        "expo_denoising",
        (*EXPO, f'rewards=[{{"name": "denoising", "type": "denoising", {DENOISING}}}]'),
        (),
    ),
    "agreement": ("", (), ("diffusion_dpo",)),
}
ONLINE_PAIRS = {"improvement_dpo_32": 32, "improvement_dpo_96": 96, "improvement_dpo": 288}
MODELS = tuple(arm for arm in ARMS if arm != "agreement")

Scores = dict[str, list[float]]
Row = dict[str, object]
Results = dict[str, dict[str, Row]]


# ---- running
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    runs: Path
    extra: tuple[str, ...]
    sizes: Sizes

    @property
    def folder(self) -> Path:
        return folder_of(self.runs, self.arm, self.seed)

    @property
    def result(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.json"


def folder_of(runs: Path, arm: str, seed: int) -> Path:
    return runs / arm / f"seed-{seed}"


def do(job: Job) -> None:
    """Run one job and what it needs, or what is left of it."""
    for arm in ARMS[job.arm][2]:
        do(Job(arm, job.seed, job.runs, job.extra, job.sizes))
    if job.result.exists():
        if json.loads(job.result.read_text())["sizes"] != asdict(job.sizes):
            raise SystemExit(f"{job.result} was made with other sizes; choose another --runs or remove it")
        return
    print(f"--- {job.arm}, seed {job.seed}", flush=True)
    # Nothing of the base depends on the seed: prompts and noise of the evaluation are always the same.
    known = sorted(job.result.parent.glob("seed-*.json")) if job.arm == "base" else []
    if job.arm == "agreement":
        row = agreement(job)
    elif known:
        row = json.loads(known[0].read_text())
    else:
        if ARMS[job.arm][0]:
            run_recipe(job)
        row = examine(job)
    write_json(job.result, row | {"sizes": asdict(job.sizes)})


def run_recipe(job: Job) -> None:
    """`diffexpo run`, or its continuation; of the improver only the stage that trains it."""
    recipe, settings, needed = ARMS[job.arm]
    if is_trained(job):
        return
    command = [sys.executable, "-m", "diffexpo"]
    if (job.folder / "config.yaml").exists():
        command += ["run", "--resume", str(job.folder)]
    else:
        folders = {arm: folder_of(job.runs, arm, job.seed).as_posix() for arm in needed}
        command += ["run", f"emoji/{recipe}", "--out", str(job.folder)]
        for setting in (*COMMON, *settings, f"seed={job.seed}", *shortened(job), *job.extra):
            for arm, folder in folders.items():
                setting = setting.replace(f"{{{arm}}}", folder)
            command += ["--set", setting]
    if job.arm == "improver":
        command += ["--stop-after", "improver-0"]
    subprocess.run(command, check=True)


def shortened(job: Job) -> list[str]:
    """Settings of a job that only tries the script."""
    if job.sizes != TINY:
        return []
    improver = [f"algorithm.improver.{setting}" for setting in TINY_IMPROVER if job.arm == "improver"]
    return [*TINY_SETTINGS, *improver]


def is_trained(job: Job) -> bool:
    if job.arm == "improver":
        return (job.folder / "store" / "manifests" / "improver-0000.json").exists()
    status = job.folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


# ---- looking at models
# -----------------------------------------------------------------------------------------------

Draw = Callable[[Sequence[Prompt], Sequence[tuple[str | int, ...]]], Tensor]


def examine(job: Job) -> Row:
    """Scores of an arm's model on training and held-out prompts, Vendi scores, and what it cost."""
    config, policy, draw = drawer(job)
    scorers = judges(policy)
    row: Row = {"scores": {}, "vendi": {}, "prompts": {}}
    for name, source in SETS.items():
        count = getattr(job.sizes, name)
        prompts = choose_prompts(named_prompts(source, "prompts"), count, EVALUATION_SEED)
        scores, vendi = look(policy, draw, prompts, scorers, job.sizes)
        row["scores"][name], row["vendi"][name] = scores, vendi
        row["prompts"][name] = [prompt.id for prompt in prompts]
    return row | {"cost": costs(job), "settings": list(ARMS[job.arm][1]), "config": config.algorithm.type}


def drawer(job: Job) -> tuple[RunConfig, Policy, Draw]:
    """Settings, model and how it draws: by itself, or as the improvement model from the base's images."""
    if job.arm == "base":
        config = load_config(["emoji/expo"], [f"seed={job.seed}", *model_settings(job.extra)], {}).config
        policy, version = build_policy(config), "base"
    else:
        config, store, policy = open_run(job.folder)
        version = "current"
        if job.arm == "improver":
            version = "base"
        else:
            load_weights(job.folder, policy, config.explore.iterations, "current")
    embeddings = PromptEmbeddings(policy, [""])

    def plain(prompts: Sequence[Prompt], keys: Sequence[tuple[str | int, ...]]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        with policy.weights.use(version):
            return draw_latents(policy, embeddings, SAMPLER, keys, texts, [""] * len(texts), lambda: None)

    if job.arm != "improver":
        return config, policy, plain
    improver = restore_improver(config, job.folder, store, policy)
    sampler, scales = improver_sampler(config), double_guidance_of(config)

    def improved(prompts: Sequence[Prompt], keys: Sequence[tuple[str | int, ...]]) -> Tensor:
        texts, names = [prompt.text for prompt in prompts], [("improve", *key) for key in keys]
        return improve_latents(
            improver, embeddings, sampler, scales, names, texts, plain(prompts, keys), lambda: None
        )

    return config, policy, improved


def model_settings(extra: Sequence[str]) -> list[str]:
    return [setting for setting in extra if setting.startswith("model.")]


def judges(policy: Policy) -> list:
    configs = [read_card(name=name, type="clip", path=f"emoji:{name}") for name in JUDGES]
    return load_rewards(configs, resolve, policy.device)


def look(
    policy: Policy, draw: Draw, prompts: Sequence[Prompt], scorers: Sequence, sizes: Sizes
) -> tuple[dict[str, list[float]], list[float]]:
    """Scores (N,) of the first image of each prompt by judge, and the Vendi score of each of the first
    prompts."""
    wanted = [(prompt, 0) for prompt in prompts]
    many = prompts[: sizes.vendi_prompts]
    wanted += [(prompt, index) for prompt in many for index in range(1, sizes.vendi_images)]
    scores: dict[str, list[float]] = {name: [] for name in JUDGES}
    features: dict[str, list[np.ndarray]] = {prompt.id: [] for prompt in many}
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        some = [prompt for prompt, _ in part]
        keys = [(EVALUATION_SEED, "evaluate", prompt.id, index) for prompt, index in part]
        images = quantise(policy.decode_latents(draw(some, keys)))
        found = score_drawn(scorers, Drawn(images=images), [prompt.text for prompt in some])
        embedded = scorers[0].embed_images(images).detach().cpu().numpy()
        for row, (prompt, index) in enumerate(part):
            if index == 0:
                for name in JUDGES:
                    scores[name].append(float(f"{found[name][row]:.7g}"))
            if prompt.id in features:
                features[prompt.id].append(embedded[row])
    return scores, [vendi_score(np.stack(rows)) for rows in features.values()]


def costs(job: Job) -> dict[str, float]:
    """Network evaluations of drawing, improving and training, and of a self-judge."""
    if job.arm == "base":
        return {"evaluations": 0.0, "judging": 0.0, "seconds": 0.0}
    lines = read_metrics(job.folder / "metrics.jsonl")
    spent = [line for line in lines if line.get("phase") != "evaluate"]
    config = open_config(job.folder)
    images = sum(float(line.get("rollout/images") or 0) for line in lines)
    asked = [reward for reward in config.rewards if reward.type in ("implicit", "denoising")]
    return {
        "evaluations": sum(float(line.get("cost/network_evaluations") or 0) for line in spent),
        "judging": images * sum(2 * reward.self_judge.draws for reward in asked),
        "seconds": sum(
            float(value or 0)
            for line in spent
            for name, value in line.items()
            if name.startswith("time/") and name.endswith("_s")
        ),
    }


def open_config(folder: Path) -> RunConfig:
    return load_config([str(folder / "config.yaml")], [], {}).config


def agreement(job: Job) -> Row:
    """Scores of the base's images (prompts x images) under both judges and both self-judges; and who agrees
    with offline labels."""
    sizes = job.sizes
    config = load_config(["emoji/expo"], [f"seed={job.seed}", *model_settings(job.extra)], {}).config
    policy = build_policy(config)
    settings = SelfJudgeConfig(draws=4, timestep_range=(0.3, 1.0))
    trained = folder_of(job.runs, "diffusion_dpo", job.seed)
    rewards = [
        *(read_card(name=name, type="clip", path=f"emoji:{name}") for name in JUDGES),
        read_card(name="implicit", type="implicit", path=str(trained), self_judge=settings),
        read_card(name="denoising", type="denoising", self_judge=settings),
    ]
    scorers = load_rewards(rewards, resolve, policy.device, partial(open_denoiser, config, policy))
    embeddings = PromptEmbeddings(policy, [""])
    prompts = choose_prompts(named_prompts(SETS["train"], "prompts"), sizes.agreement_prompts, job.seed)
    wanted = [(prompt, index) for prompt in prompts for index in range(sizes.agreement_images)]
    scores: Scores = {reward.name: [] for reward in rewards}
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        texts = [prompt.text for prompt, _ in part]
        keys = [(job.seed, "agreement", prompt.id, index) for prompt, index in part]
        with policy.weights.use("base"):
            latents = draw_latents(policy, embeddings, SAMPLER, keys, texts, [""] * len(texts), lambda: None)
        found = score_drawn(scorers, Drawn(latents, policy.decode_latents(latents)), texts)
        for name, values in found.items():
            scores[name] += [float(f"{value:.7g}") for value in values]
    shape = (len(prompts), sizes.agreement_images)
    tables = {name: np.array(values).reshape(shape).tolist() for name, values in scores.items()}
    return {"scores": tables, "labels": label_agreement(trained, policy, scorers[2:], sizes)}


def label_agreement(folder: Path, policy: Policy, scorers: Sequence, sizes: Sizes) -> dict[str, list[float]]:
    """For some offline pairs, 1 where a self-judge scores the labelled winner higher, 1/2 where equal. The
    implicit one has learned from these pairs."""
    store = Store(folder / "store", create=False)
    pairs = store.pairs(source="offline")[: sizes.agreement_prompts * 2]
    texts = [pair.prompt for pair in pairs]
    sides = []
    for side in ("winner_id", "loser_id"):
        latents = torch.from_numpy(store.latents([getattr(pair, side) for pair in pairs]))
        sides.append({scorer.name: scorer.score(latents, texts).numpy() for scorer in scorers})
    return {
        name: ((sides[0][name] > sides[1][name]) + 0.5 * (sides[0][name] == sides[1][name])).tolist()
        for name in sides[0]
    }


# ---- comparing
# -------------------------------------------------------------------------------------------------------

Estimate = dict[str, float]


def estimate(
    values: Sequence[float] | np.ndarray, clusters: Sequence[str] | None, resamples: int
) -> Estimate:
    mean, low, high = bootstrap_mean(values, clusters, resamples=resamples)
    return {"mean": mean, "low": low, "high": high}


def paired(results: Results, first: str, second: str) -> list[str]:
    """Seeds that both arms have."""
    return [seed for seed in results.get(first, {}) if seed in results.get(second, {})]


def stacked(results: Results, arm: str, seeds: Sequence[str], group: str, judge: str) -> np.ndarray:
    return np.concatenate([results[arm][seed]["scores"][group][judge] for seed in seeds])


def wins(
    results: Results, first: str, second: str, group: str, judge: str, resamples: int
) -> Estimate | None:
    """How often `first` beats `second` on the same prompt and noise, over all seeds that both have, by
    prompt."""
    seeds = paired(results, first, second)
    if not seeds:
        return None
    labels = [name for seed in seeds for name in results[first][seed]["prompts"][group]]
    left, right = (stacked(results, arm, seeds, group, judge) for arm in (first, second))
    found = win_rate(left, right, prompts=labels, resamples=resamples)
    each = [wins_of_seed(results, first, second, seed, group, judge) for seed in seeds]
    return {"rate": found.rate, "low": found.low, "high": found.high, "seeds": each}


def wins_of_seed(results: Results, first: str, second: str, seed: str, group: str, judge: str) -> float:
    left, right = (np.array(results[arm][seed]["scores"][group][judge]) for arm in (first, second))
    return float(((left > right) + 0.5 * (left == right)).mean())


def gain(
    results: Results, first: str, second: str, group: str, judge: str, resamples: int
) -> Estimate | None:
    """Mean difference of scores on the same prompt and noise, over all seeds that both have, by prompt."""
    seeds = paired(results, first, second)
    if not seeds:
        return None
    labels = [name for seed in seeds for name in results[first][seed]["prompts"][group]]
    left, right = (stacked(results, arm, seeds, group, judge) for arm in (first, second))
    return estimate(left - right, labels, resamples)


def vendi_gain(results: Results, first: str, second: str, group: str, resamples: int) -> Estimate | None:
    """Mean difference of Vendi scores of the same prompts, over all seeds that both have, by prompt."""
    seeds = paired(results, first, second)
    if not seeds:
        return None
    left, right = (
        np.array([results[arm][seed]["vendi"][group] for seed in seeds]) for arm in (first, second)
    )
    return estimate((left - right).mean(axis=0), None, resamples)


def agreements(rows: Mapping[str, Row], first: str, second: str, resamples: int) -> dict[str, Estimate]:
    """Share of couples of a prompt's images that two scorers order alike; and how often the first one's best
    beats its worst under the second, which is the pair that EXPO would make."""
    alike, best = [], []
    for row in rows.values():
        for a, b in zip(np.array(row["scores"][first]), np.array(row["scores"][second]), strict=True):
            products = (a[:, None] - a[None, :]) * (b[:, None] - b[None, :])
            decided = (products > 0).sum() + (products < 0).sum()
            alike.append(float((products > 0).sum() / decided) if decided else 0.5)
            gap = b[a.argmax()] - b[a.argmin()]
            best.append(float(gap > 0) + 0.5 * float(gap == 0))
    return {"alike": estimate(alike, None, resamples), "best": estimate(best, None, resamples)}


# ---- verdicts
# --------------------------------------------------------------------------------------------------------


def above(value: Estimate | None, level: float) -> str:
    """A claim that a number lies above a level, by its interval."""
    if value is None:
        return "not run"
    if value["low"] > level:
        return "holds"
    return "does not hold" if value["high"] < level else "undecided"


def all_of(*verdicts: str) -> str:
    for name in ("not run", "does not hold", "undecided"):
        if name in verdicts:
            return name
    return "holds"


def claims(results: Results, resamples: int) -> list[tuple[str, str, str]]:
    """(claim, what was measured, verdict)."""

    def won(first: str, second: str, group: str = "heldout") -> Estimate | None:
        return wins(results, first, second, group, JUDGES[0], resamples)

    def gained(first: str, second: str, group: str) -> Estimate | None:
        return gain(results, first, second, group, JUDGES[0], resamples)

    def varied(first: str, second: str) -> Estimate | None:
        return vendi_gain(results, first, second, "heldout", resamples)

    ours = "improvement_dpo"
    rows = []
    for text, first, second in (
        ("iterating with the improvement model beats the model it starts from", ours, "base"),
        ("it beats Diffusion-DPO on the same pairs", ours, "diffusion_dpo"),
        ("it beats SPIN", ours, "spin"),
        ("started from SPIN, it goes beyond SPIN", "improvement_after_spin", "spin"),
    ):
        rate = won(first, second)
        rows.append((text, f"wins {share(rate)} of held-out prompts", above(rate, 0.5)))
    for text, second in (
        ("more diverse than SPIN", "spin"),
        ("more diverse than Diffusion-DPO", "diffusion_dpo"),
    ):
        change = varied(ours, second)
        rows.append((text, f"Vendi score {signed(change)}", above(change, 0.0)))
    more = [gained(ours, "improvement_dpo_32", group) for group in SETS]
    rows.append(
        (
            "more online pairs score higher, on training and on test prompts",
            f"288 against 32 pairs: training {signed(more[0])}, held-out {signed(more[1])}",
            all_of(*(above(one, 0.0) for one in more)),
        )
    )
    direct = [gained("improver", ours, "train"), gained(ours, "improver", "heldout")]
    rows.append(
        (
            (
                "the improvement model used directly is better on training prompts and worse on test prompts "
                "than the iterated model"
            ),
            (
                f"training: improver less iterated {signed(direct[0])}; held-out: iterated less improver "
                f"{signed(direct[1])}"
            ),
            all_of(*(above(one, 0.0) for one in direct)),
        )
    )
    for text, arm in (
        ("EXPO improves the base when the implicit reward ranks (ours)", "expo_implicit"),
        ("EXPO improves the base when the denoising error ranks (ours)", "expo_denoising"),
        ("EXPO improves the base when a reward ranks (control)", "expo_judge"),
    ):
        rate = won(arm, "base")
        rows.append((text, f"wins {share(rate)} of held-out prompts", above(rate, 0.5)))
    for name in ("implicit", "denoising"):
        text = f"the {name} score orders images of a prompt better than chance (ours)"
        found = (
            agreements(results["agreement"], name, JUDGES[0], resamples)["alike"]
            if results.get("agreement")
            else None
        )
        shown = (
            ""
            if found is None
            else f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}] as the held-out judge"
        )
        rows.append((text, shown or "-", above(found, 0.5)))
    return rows


# ---- tables
# ----------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def share(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{percent(value['rate'])} [{percent(value['low'])}, {percent(value['high'])}]"


def signed(value: Estimate | None) -> str:
    return "-" if value is None else f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def mean_of(results: Results, arm: str, group: str, judge: str, resamples: int) -> str:
    """Mean over prompts and seeds with its interval."""
    rows = results[arm]
    labels = [name for row in rows.values() for name in row["prompts"][group]]
    found = estimate(stacked(results, arm, list(rows), group, judge), labels, resamples)
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def vendi_of(results: Results, arm: str, group: str) -> str:
    return f"{np.mean([row['vendi'][group] for row in results[arm].values()]):.2f}"


def markdown(results: Results, sizes: Sizes) -> str:
    """All tables of the page, with the rule behind each verdict above them."""
    there = [arm for arm in MODELS if results.get(arm)]
    return "\n\n".join(
        part
        for part in (
            claim_table(results, sizes.resamples),
            score_table(results, there, sizes.resamples),
            pairs_table(results, sizes.resamples),
            improver_table(results, sizes.resamples),
            win_table(results, there, sizes.resamples),
            agreement_table(results.get("agreement", {}), sizes.resamples),
        )
        if part
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) if rows else ""


def claim_table(results: Results, resamples: int) -> str:
    rows = [row for row in claims(results, resamples) if row[2] != "not run"]
    return table("Claims and verdicts", ("claim", "measured, 95% interval", "verdict"), rows)


def score_table(results: Results, arms: Sequence[str], resamples: int) -> str:
    head = [
        "arm",
        "seeds",
        "held-out judge, training prompts",
        "Vendi",
        "held-out judge, unseen prompts",
        "Vendi",
    ]
    rows = []
    for arm in arms:
        row = [f"`{arm}`", str(len(results[arm]))]
        for group in SETS:
            row += [mean_of(results, arm, group, JUDGES[0], resamples), vendi_of(results, arm, group)]
        costs = [one["cost"] for one in results[arm].values()]
        row += [f"{np.mean([cost[name] for cost in costs]):,.0f}" for name in ("evaluations", "judging")]
        rows.append(row)
    title = "Table 1: score and diversity, mean over prompts and seeds"
    return table(title, [*head, "network evaluations", "of the judge, on top"], rows)


def pairs_table(results: Results, resamples: int) -> str:
    rows = [
        [str(count), *(mean_of(results, arm, group, JUDGES[0], resamples) for group in SETS)]
        + [signed(gain(results, arm, "base", group, JUDGES[0], resamples)) for group in SETS]
        for arm, count in ONLINE_PAIRS.items()
        if results.get(arm)
    ]
    head = ["online pairs", "training prompts", "unseen prompts", "against the base, training", "unseen"]
    return table("Table 2: number of online pairs of improvement DPO, held-out judge", head, rows)


def improver_table(results: Results, resamples: int) -> str:
    names = {
        "spin": "SPIN",
        "improver": "improvement model, on the base's images",
        "improvement_dpo": "iterated",
    }
    names["improvement_after_spin"] = "iterated, from SPIN"
    rows = [
        [label, *(mean_of(results, arm, group, JUDGES[0], resamples) for group in SETS)]
        + [signed(gain(results, arm, "base", group, JUDGES[0], resamples)) for group in SETS]
        for arm, label in names.items()
        if results.get(arm)
    ]
    head = ["method", "training prompts", "unseen prompts", "against the base, training", "unseen"]
    return table(
        "Table 3: the improvement model used directly against the iterated model, held-out judge", head, rows
    )


def win_table(results: Results, arms: Sequence[str], resamples: int) -> str:
    rows = []
    for arm in (name for name in arms if name != "base"):
        row = [f"`{arm}`"]
        for judge in JUDGES:
            for group in reversed(SETS):
                found = wins(results, arm, "base", group, judge, resamples)
                each = ", ".join(percent(value) for value in found["seeds"]) if found else "-"
                row.append(f"{share(found)} ({each})" if judge == JUDGES[0] else share(found))
        rows.append(row)
    head = [
        "arm",
        "held-out judge, unseen prompts (each seed)",
        "held-out judge, training prompts (each seed)",
    ]
    head += ["training judge, unseen prompts", "training judge, training prompts"]
    return table("Table 4: wins against the base", head, rows)


def agreement_table(rows: Mapping[str, Row], resamples: int) -> str:
    if not rows:
        return ""
    lines = []
    for first in ("implicit", "denoising", "judge_train"):
        line = [f"`{first}`"]
        for second in JUDGES:
            found = agreements(rows, first, second, resamples) if first != second else None
            line += [interval(found["alike"]), interval(found["best"])] if found else ["-", "-"]
        labels = [value for row in rows.values() for value in row["labels"].get(first, [])]
        line.append(interval(estimate(labels, None, resamples)) if labels else "-")
        lines.append(line)
    head = ["scorer", "orders couples as `judge_heldout`", "its best beats its worst there"]
    head += [
        "orders couples as `judge_train`",
        "its best beats its worst there",
        "agrees with the labels of offline pairs",
    ]
    return table("Self-judges against a reward, on the base's images of one prompt", head, lines)


def interval(value: Estimate) -> str:
    return f"{percent(value['mean'])} [{percent(value['low'])}, {percent(value['high'])}]"


def draw_figure(results: Results, path: Path, resamples: int) -> None:
    """Gains over the base by arm, their change with online pairs, and Vendi scores."""
    arms = [arm for arm in MODELS if arm != "base" and results.get(arm) and paired(results, arm, "base")]
    if not arms:
        return
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(12.5, 3.8), layout="constrained", width_ratios=(2, 1, 2)
    )
    places = np.arange(len(arms))
    for shift, group in ((-0.15, "train"), (0.15, "heldout")):
        found = [gain(results, arm, "base", group, JUDGES[0], resamples) for arm in arms]
        bars(left, places + shift, found, group)
        varied = [vendi_gain(results, arm, "base", group, resamples) for arm in arms]
        bars(right, places + shift, varied, group)
        sizes = [arm for arm in ONLINE_PAIRS if arm in arms]
        curve = [gain(results, arm, "base", group, JUDGES[0], resamples) for arm in sizes]
        if curve:
            bars(middle, [ONLINE_PAIRS[arm] for arm in sizes], curve, group, line="-")
    for axes, label in ((left, "held-out judge: change"), (right, "Vendi score: change")):
        axes.set_yticks(places, arms, fontsize=8)
        axes.axvline(0.0, color="0.7", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    middle.axhline(0.0, color="0.7", linewidth=0.8)
    middle.set_xlabel("online pairs of improvement DPO")
    middle.set_ylabel("held-out judge: change")
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def bars(
    axes: pyplot.Axes, at: Sequence[float], found: Sequence[Estimate], group: str, line: str = ""
) -> None:
    """Means with intervals: along x beside names, along y over a number."""
    mean, low, high = (np.array([one[key] for one in found]) for key in ("mean", "low", "high"))
    color = "C0" if group == "heldout" else "C1"
    label = "unseen prompts" if group == "heldout" else "training prompts"
    spread = [mean - low, high - mean]
    if line:
        axes.errorbar(
            at, mean, yerr=spread, fmt=f"o{line}", color=color, markersize=4, capsize=2, label=label
        )
    else:
        axes.errorbar(mean, at, xerr=spread, fmt="o", color=color, markersize=4, capsize=2, label=label)


# ---- files
# -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, payload: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(payload) + "\n")
    temporary.replace(path)


def read_results(runs: Path) -> Results:
    """Every finished job, by arm and seed."""
    found: Results = {}
    for arm in ARMS:
        for path in sorted((runs / arm).glob("seed-*.json")):
            found.setdefault(arm, {})[path.stem] = json.loads(path.read_text())
    return found


def packed(results: Results) -> Row:
    """Results with the prompts, which are the same in all of them, once."""
    rows = [row for seeds in results.values() for row in seeds.values() if "prompts" in row]
    prompts = rows[0]["prompts"] if rows else {}
    assert all(row["prompts"] == prompts for row in rows)
    bare = {
        arm: {seed: {name: row[name] for name in row if name != "prompts"} for seed, row in seeds.items()}
        for arm, seeds in results.items()
    }
    return {"prompts": prompts, "results": bare}


def unpacked(saved: Row) -> Results:
    """What `packed` was given."""
    return {
        arm: {seed: row | {"prompts": saved["prompts"]} for seed, row in seeds.items()}
        for arm, seeds in saved["results"].items()
    }


SHOWN = {
    "base": "base",
    "diffusion_dpo": "Diffusion-DPO",
    "spin": "SPIN",
    "improver": "improver",
    "improvement_dpo": "iterated",
    "improvement_after_spin": "it., from SPIN",
    "expo_denoising": "expo_denoising",
}


def draw_pictures(runs: Path, seed: int, count: int, path: Path) -> None:
    """The first held-out prompts in keyed order, not chosen by hand, drawn by several arms from the same
    noise."""
    prompts = choose_prompts(named_prompts(SETS["heldout"], "prompts"), count, EVALUATION_SEED)
    keys = [(EVALUATION_SEED, "evaluate", prompt.id, 0) for prompt in prompts]
    columns = []
    for arm in SHOWN:
        _, policy, draw = drawer(Job(arm, seed, runs, (), Sizes()))
        columns.append(to_bytes(policy.decode_latents(draw(prompts, keys))))
    rows = [list(row) for row in zip(*columns, strict=True)]
    image_grid(rows, [prompt.text for prompt in prompts], list(SHOWN.values()), tile=112).save(
        path, optimize=True
    )


BEGIN, END = "<!-- begin: benchmarks/without_reward.py --markdown -->", "<!-- end -->"


def fill_page(page: Path, text: str) -> None:
    """Put the tables between the markers of a page."""
    whole = page.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or END not in whole.partition(BEGIN)[2]:
        raise SystemExit(
            f"{page}: expected one line {BEGIN} and {END} below it; add them where the tables belong"
        )
    before, _, rest = whole.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/without_reward"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tiny", action="store_true", help="a few steps and images only, to try the script")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "without_reward.json")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "without_reward.png")
    parser.add_argument("--pictures", action="store_true", help="run nothing; draw a grid beside --image")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--markdown", action="store_true", help="run nothing; write the tables into --page")
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    if options.markdown:
        results = unpacked(json.loads(options.out.read_text()))
        draw_figure(results, options.image, sizes.resamples)
        picture = os.path.relpath(options.image, options.page.parent)
        shown = f"![Gains over the base by arm, by number of online pairs, and Vendi scores; 95% intervals]({picture})"
        fill_page(options.page, f"{markdown(results, sizes)}\n\n{shown}")
        return
    runs = options.runs
    if options.pictures:
        grid = options.image.with_name(f"{options.image.stem}_pictures.png")
        draw_pictures(runs, options.seeds[0], 10, grid)
        return
    for seed in options.seeds:
        for arm in options.arms:
            do(Job(arm, seed, runs, tuple(options.settings), sizes))
            results = read_results(runs)
            payload = {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                "budget": BUDGET,
                "settings": [*COMMON, *options.settings],
                **packed(results),
            }
            write_json(options.out, payload)
    results = read_results(runs)
    draw_figure(results, options.image, sizes.resamples)
    print(markdown(results, sizes))


if __name__ == "__main__":
    main()
