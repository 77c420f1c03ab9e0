"""What every model family promises: it is the pipeline's own model, it samples, learns, stops and goes on, and ends in plain
diffusers. One tiny folder a family; docs/adding_a_model.md says how to add a row.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.numpy import load_file
from torch import Tensor, nn

from diffexpo import assembly
from diffexpo.algorithms import algorithm_class
from diffexpo.cli.progress import Console, Phase
from diffexpo.config import RunConfig, load_config
from diffexpo.config import families as cards
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import LoraConfig, ModelConfig, SamplerConfig, TuningConfig
from diffexpo.diffusion import NoiseSource, sample, sample_trajectory
from diffexpo.errors import Interrupted
from diffexpo.online.loop import Console as ConsoleProtocol
from diffexpo.policies.base import load_policy
from diffexpo.training.checkpoint import read_tensors
from diffexpo.types import Conditioning, PairBatch, Policy
from tests.contract.family import Family
from tests.contract.sana_families import FAMILIES as SANA_FAMILIES
from tests.contract.transformer_families import FAMILIES as TRANSFORMER_FAMILIES
from tests.contract.unet_families import FAMILIES as UNET_FAMILIES
from tests.unit.diffusion.toys import replayed_log_probs

FAMILIES = (*UNET_FAMILIES, *TRANSFORMER_FAMILIES, *SANA_FAMILIES)
# The family whose network is told the size of the picture.
FAMILY_OF_SIZES = next(family for family in FAMILIES if family.name == "sdxl")
# NumPy 2 warns about how the solver that a folder may name hands torch tensors to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
PROMPT = "a cat"
STEPS = 3
# Ours and the schedulers' arithmetic differ in rounding only: three steps of guided float32 networks and a
# decoder, each of whose sums of some hundred terms loses about 1e-6.
IMAGE_TOLERANCE = 5e-5


@dataclass
class Built:
    """A family's folder, our policy on it and diffusers' pipeline of it."""

    family: Family
    folder: Path
    policy: Policy
    pipeline: DiffusionPipeline

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        height, width = (side * self.pipeline.vae_scale_factor for side in self.policy.latent_shape[1:])
        return height, width

    @property
    def guidances(self) -> tuple[float, ...]:
        """Without guidance and, where the pipeline has it, with."""
        return tuple(dict.fromkeys((1.0, self.family.guidance)))


@dataclass
class Call:
    """One call of the pipeline's network: what went in as latents and time, and what came out."""

    x_t: Tensor
    timestep: Tensor
    output: Tensor


@dataclass
class FixedNoise(NoiseSource):
    """Starts from given latents; a deterministic sampler asks for nothing more."""

    latents: Tensor
    generators: tuple[torch.Generator, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__init__([torch.Generator() for _ in self.latents], self.latents.shape[1:])

    def draw(self) -> Tensor:
        return self.latents.clone()


@pytest.fixture(scope="module", params=FAMILIES, ids=[family.name for family in FAMILIES])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family: Family = request.param
    folder = tmp_path_factory.mktemp("families") / family.name
    family.build(folder, 0)
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=4, target_modules=family.lora_targets))
    policy = load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(folder), seed=0)
    return Built(family, folder, policy, plain_pipeline(family, folder))


def plain_pipeline(family: Family, folder: Path) -> DiffusionPipeline:
    """The folder as any user loads it."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
        folder, local_files_only=True, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def noise(policy: Policy, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def deterministic(policy: Policy, guidance: float) -> SamplerConfig:
    name = "flow_euler" if policy.path.kind == "flow" else "ddim"
    return SamplerConfig(name=name, steps=STEPS, guidance=guidance)


def random(policy: Policy, guidance: float) -> SamplerConfig:
    name = "flow_sde" if policy.path.kind == "flow" else "ddim"
    return SamplerConfig(name=name, steps=STEPS, guidance=guidance, eta=1.0)


def record(built: Built, guidance: float) -> tuple[list[Call], Tensor]:
    """The pipeline's picture and every call of its network."""
    calls: list[Call] = []
    shape = built.policy.latent_shape

    def hook(module: nn.Module, inputs: tuple, kwargs: dict, output: tuple) -> None:
        x_t = inputs[0] if inputs else kwargs["hidden_states"]
        timestep = inputs[1] if len(inputs) > 1 else kwargs["timestep"]
        unpack = built.family.unpack
        calls.append(
            Call(unpack(x_t, shape).clone(), timestep.reshape(-1)[:1], unpack(output[0], shape).clone())
        )

    handle = denoiser(built.pipeline).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        image = built.family.draw(built.pipeline, PROMPT, noise(built.policy), STEPS, guidance, built.size)
    handle.remove()
    return calls, image


def time_of(policy: Policy, call: Call, first: Call) -> Tensor:
    """t in [0, 1] of a call, exact: float64, so that t times the number of levels gives the timestep's float32 again."""
    if policy.path.kind == "vp":
        return call.timestep.float() / (policy.path.num_train_timesteps - 1)
    # The first call is at t = 1, whatever unit the network counts in.
    return call.timestep.double() / float(first.timestep)


def conditioning_of(policy: Policy, rows: int) -> Conditioning:
    """The prompt, or the empty one before it under guidance."""
    return policy.encode_prompts(["", PROMPT] if rows == 2 else [PROMPT])


def check_predictions(built: Built, policy: Policy, guidance: float) -> Tensor:
    """Every network call of the pipeline has the bits of `predict`; returns the picture."""
    calls, image = record(built, guidance)
    assert len(calls) == STEPS
    for call in calls:
        rows = len(call.x_t)
        t = time_of(policy, call, calls[0]).expand(rows)
        with torch.no_grad():
            ours = policy.predict(call.x_t, t, conditioning_of(policy, rows))
        assert torch.equal(ours, call.output), float((ours - call.output).abs().max())
    return image


def draw(policy: Policy, guidance: float) -> Tensor:
    """Our sampler's picture of the same noise."""
    negative = policy.encode_prompts([""]) if guidance != 1.0 else None
    latents = sample(
        policy,
        policy.encode_prompts([PROMPT]),
        negative,
        deterministic(policy, guidance),
        FixedNoise(noise(policy)),
    )
    return policy.decode_latents(latents)


# ---- the model --------------------------------------------------------------------------------------------------


def test_images_become_latents_and_images_again(built: Built) -> None:
    policy, vae = built.policy, built.pipeline.vae
    images = torch.rand(2, 3, *built.size, generator=torch.Generator().manual_seed(1))
    latents = policy.encode_images(images)
    assert tuple(latents.shape[1:]) == policy.latent_shape
    shift = vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        mean = built.family.clean_latents(vae, images * 2 - 1)
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
    assert torch.equal(latents, (mean - shift) * vae.config.scaling_factor)
    assert torch.equal(policy.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))
    wild = policy.decode_latents(100 * latents)
    assert wild.dtype == torch.float32 and wild.shape == images.shape
    assert float(wild.min()) >= 0 and float(wild.max()) <= 1


def test_predictions_and_pictures_are_the_pipelines(built: Built) -> None:
    pictures = []
    for guidance in built.guidances:
        image = check_predictions(built, built.policy, guidance)
        assert float((draw(built.policy, guidance) - image).abs().max()) <= IMAGE_TOLERANCE
        pictures.append(image)
    if len(pictures) == 2:
        assert float((pictures[0] - pictures[1]).abs().max()) > 1e-3, "guidance changes nothing"


def test_a_text_does_not_depend_on_its_neighbours(built: Built) -> None:
    policy = built.policy
    alone = policy.encode_prompts([PROMPT])
    among = policy.encode_prompts(["two dogs and more words", PROMPT, "", PROMPT])
    for name, tensor in alone.tensors.items():
        for row in (1, 3):
            assert torch.equal(among.tensors[name][row], tensor[0]), name
    assert any(not torch.equal(among.tensors[name][0], among.tensors[name][1]) for name in alone.tensors), (
        "the text changes nothing"
    )


def test_too_long_a_text_is_counted_whole_and_cut_as_the_pipeline_cuts_it(built: Built) -> None:
    policy = built.policy
    long = "cat " * policy.max_tokens
    assert policy.count_tokens([PROMPT])[0] <= policy.max_tokens < policy.count_tokens([long])[0]
    one, other = policy.encode_prompts([long]), policy.encode_prompts([long + "dog"])
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def test_replayed_log_probs_are_those_of_the_draw(built: Built) -> None:
    policy = built.policy
    sampler = random(policy, built.family.guidance)
    text = policy.encode_prompts([PROMPT, "a dog"])
    negative = policy.encode_prompts(["", ""]) if sampler.guidance != 1.0 else None
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    trajectory = sample_trajectory(
        policy, text, negative, sampler, NoiseSource(generators, policy.latent_shape)
    )
    with torch.no_grad():
        again = replayed_log_probs(policy, trajectory, text, negative, sampler)
    assert torch.equal(again, trajectory.mean_log_probs)
    assert bool(trajectory.has_density.any()) and bool(again[trajectory.has_density].ne(0).all())


def test_dpo_starts_at_ln_2_and_reaches_every_adapter(built: Built) -> None:
    policy = built.policy
    algorithm = algorithm_class("diffusion_dpo")(DiffusionDpoConfig(beta=100.0), policy.encode_prompts([""]))
    batch = PairBatch(
        winner=noise(policy, 4, 1),
        loser=noise(policy, 4, 2),
        conditioning=policy.encode_prompts([PROMPT, "a dog", "red", "blue"]),
        keys=tuple("abcd"),
    )
    loss = algorithm.loss(policy, batch, (0, "contract")).loss
    # The margin is exactly 0; each processor rounds ln 2 to float32 in its own way.
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=4e-7)
    loss.backward()
    gradients = {name: value.grad for name, value in policy.weights.trainable().items()}
    for value in policy.weights.trainable().values():
        value.grad = None
    reached = [name for name, grad in gradients.items() if ".lora_B." in name and bool(grad.ne(0).any())]
    # A family may hold projections that its last block computes and drops.
    assert len(reached) >= 0.8 * len(gradients) / 2


# ---- whole runs ---------------------------------------------------------------------------------------------------

SMALL = [
    "explore.iterations=2",
    "explore.prompts_per_iteration=2",
    "explore.negatives.source=null",
    "explore.sampler.steps=2",
    "training.steps=3",
    "training.batch_size=2",
    "training.micro_batch_size=2",
    "training.checkpoint_every=1",
    "evaluation.every_iteration=false",
    "evaluation.num_prompts=1",
    "evaluation.sampler.steps=2",
    "evaluation.kl_prompts=0",
    "evaluation.grid_prompts=1",
]


class Stopping(Console):
    """Presses Ctrl-C after the given number of advances of a phase."""

    def __init__(self, phase: str, advances: int) -> None:
        super().__init__()
        self._phase, self._left = phase, advances

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Phase]:
        with super().phase(name, total, unit) as phase:
            advance: Callable[[int], None] = phase.advance

            def counted(count: int = 1) -> None:
                advance(count)
                if name.startswith(self._phase):
                    self._left -= 1
                    if self._left == 0:
                        signal.raise_signal(signal.SIGINT)

            phase.advance = counted
            yield phase


def run(
    built: Built,
    world: Path,
    folder: Path,
    kind: str,
    console: ConsoleProtocol | None = None,
    stop_after: str | None = None,
    further: tuple[str, ...] = (),
) -> RunConfig:
    """EXPO on the tiny world with the family's model, from the start or from where it stopped."""
    policy, family = built.policy, built.family
    stochastic = random(policy, family.guidance)
    plain = deterministic(policy, family.guidance)
    settings = [
        f"model.path={built.folder}",
        f"tuning.kind={kind}",
        "tuning.lora.rank=4",
        f"tuning.lora.target_modules=[{','.join(family.lora_targets)}]",
        f"explore.sampler.name={stochastic.name}",
        f"explore.sampler.guidance={family.guidance}",
        f"evaluation.sampler.name={plain.name}",
        f"evaluation.sampler.guidance={family.guidance}",
    ]
    loaded = load_config([str(world / "recipe.yaml")], [*SMALL, *settings, *further])
    resume = (folder / "config.yaml").exists()
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=resume,
        console=console or Console(),
        stop_after=stop_after,
    )
    return loaded.config


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of the last iterate."""
    return load_file(max((folder / "checkpoints").glob("weights-*.safetensors")))


def reloaded(built: Built, folder: Path, kind: str) -> DiffusionPipeline:
    """What the run exported, in plain diffusers."""
    if kind == "full":
        return plain_pipeline(built.family, folder / "export")
    pipeline = plain_pipeline(built.family, built.folder)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(folder / "export"), weight_name="pytorch_lora_weights.safetensors")
    else:
        wrapped = PeftModel.from_pretrained(denoiser(pipeline), str(folder / "export"))
        pipeline.transformer = wrapped.get_base_model().eval()
    return pipeline


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_expo_runs_resumes_and_ends_in_plain_diffusers(
    built: Built, kind: str, world: Path, tmp_path: Path
) -> None:
    # The report says nothing of families and takes half of a tiny run's time.
    config = run(built, world, tmp_path / "run", kind, stop_after="train-2")
    assembly.export(tmp_path / "run")
    last = weights(tmp_path / "run")
    first = load_file(tmp_path / "run" / "checkpoints" / "weights-0001.safetensors")
    assert any(bool((last[name] != first[name]).any()) for name in last)

    tuning = config.tuning
    policy = load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(built.folder), seed=config.seed)
    policy.weights.load(
        "current", read_tensors(tmp_path / "run" / "checkpoints" / "weights-0002.safetensors")
    )
    export = Built(built.family, built.folder, policy, reloaded(built, tmp_path / "run", kind))
    for guidance in built.guidances:
        image = check_predictions(export, policy, guidance)
        assert float((draw(policy, guidance) - image).abs().max()) <= IMAGE_TOLERANCE
    if kind == "lora":
        with pytest.raises(Interrupted, match="iteration 2, step 1 of 3"):
            run(built, world, tmp_path / "stopped", kind, Stopping("train 2", 2))
        run(built, world, tmp_path / "stopped", kind, stop_after="train-2")
        resumed = weights(tmp_path / "stopped")
        assert all(np.array_equal(resumed[name], value) for name, value in last.items())


@pytest.mark.parametrize("built", [FAMILY_OF_SIZES], indirect=True, ids=lambda family: family.name)
def test_a_run_at_another_resolution(built: Built, world: Path, tmp_path: Path) -> None:
    """Offline pictures, samples, learning, pictures and export at 16 x 24 pixels, of a model that was made at 16 x 16."""
    run(built, world, tmp_path / "run", "lora", further=("model.resolution=[16, 24]",))
    latents = [
        tensor.shape
        for file in (tmp_path / "run" / "store").rglob("latents-*.safetensors")
        for tensor in load_file(file).values()
        if tensor.ndim > 2  # the others are a pack's index
    ]
    assert latents and {shape[-3:] for shape in latents} == {(4, 8, 12)}


def test_every_family_has_a_contract() -> None:
    assert {family.pipeline_class for family in FAMILIES} == set(cards.FAMILIES)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
