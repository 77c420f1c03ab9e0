"""Iterative DPO with an improvement model: settings and facts."""

from collections.abc import Iterator, Mapping
from typing import Literal

from diffexpo.config.methods.card import Run
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.spin import own_losers
from diffexpo.config.schema import ImproverConfig
from diffexpo.config.section import Positive


class ImprovementDpoConfig(DiffusionDpoConfig):
    """Iterative DPO with an improvement model: losers are the model's own images, winners what the
    improvement model makes of them."""

    type: Literal["improvement_dpo"] = "improvement_dpo"  # type: ignore[assignment]  # its own name
    """The training method."""
    beta: Positive = 2000.0
    """As in Diffusion-DPO, with beta/2 on mean errors (the paper: 2000, T merged)."""
    improver: ImproverConfig = ImproverConfig()
    """The improvement model."""
    filter_by_reward: bool = False
    """Keep a pair only if the train rewards too score the improved image above its loser (an ablation; the
    paper has no rewards)."""

    title = "Improvement DPO"
    papers = ("improvement_model", "wallace2024diffusiondpo", "brooks2023instructpix2pix")
    first_stages = ("improver",)
    stages = ("train", "evaluate", "collect", "improve", "pair")
    pairing = "improved"
    versions_drawn = 2
    group_size = 1
    story = "an improvement model redraws the model's own images, and the improved image wins."

    @property
    def improvement(self) -> ImproverConfig:
        return self.improver

    @property
    def filters_by_reward(self) -> bool:
        return self.filter_by_reward

    def learns_from_offline(self, run: Run) -> bool:
        """Offline pairs of weight 0 train the improvement model only."""
        return super().learns_from_offline(run) and run.hybrid.offline_weight > 0

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        improver, head = self.improver, "with algorithm.type = improvement_dpo"
        if run.offline.source is None and improver.path is None:
            yield (
                f"offline.source = null {head}: the improvement model learns from offline pairs; name some, "
                "or a trained one in algorithm.improver.path"
            )
        yield from own_losers(run, head)
        if self.needs_uncertainty:
            yield (
                f"algorithm.uncertainty = {self.uncertainty} {head}: no rewards rank its pairs, so there is "
                "no spread between them; set uncertainty: off"
            )
        if self.filter_by_reward and not any(reward.role == "train" for reward in run.rewards):
            yield (
                f"algorithm.filter_by_reward = true {head}: no reward has role: train, so nothing can "
                "filter; add one"
            )
        total = sum(improver.task_probabilities)
        if abs(total - 1) > 1e-6:
            yield (
                f"algorithm.improver.task_probabilities add up to {total:g}: expected 1, e.g. [0.8, 0.1, 0.1]"
            )
        if improver.batch_size % improver.micro_batch_size:
            yield (
                f"algorithm.improver.micro_batch_size = {improver.micro_batch_size} does not divide "
                f"algorithm.improver.batch_size = {improver.batch_size}"
            )

    def one_size_reason(self) -> str:
        return "distances between improved images and losers are measured over latents of one shape;"

    def stage_costs(self, run: Run, images: int) -> Mapping[str, int]:
        """Three predictions a step where double guidance acts, else one; training takes a forward and its
        backward on each pair, unless a trained model is given."""
        improver = self.improver
        is_single = (improver.image_scale, improver.text_scale) in ((1.0, 1.0), (1.0, 0.0))
        steps = improver.sampler_steps or run.explore.sampler.steps
        training = 3 * improver.steps * improver.batch_size if improver.path is None else 0
        return {"drawing": images * steps * (1 if is_single else 3), "training": training}

    def plan(self, run: Run) -> Mapping[str, str]:
        improver = self.improver
        steps = f"{improver.steps} steps x {improver.batch_size} offline pairs"
        scales = f"text scale {improver.text_scale:g}, image scale {improver.image_scale:g}"
        return {
            "improver": improver.path or steps,
            "improve": f"every image, {scales}",
            "pair": "improved images against their losers",
        }
