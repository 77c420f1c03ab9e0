"""Commands on an existing run: inspect, regenerate, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffexpo.assembly.aliases import resolve_model
from diffexpo.assembly.folders import iterate_path, result_path
from diffexpo.assembly.improving import restore_improver
from diffexpo.assembly.objects import build_policy
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.iterates import exported_folder, run_of_model, whole_model_folder
from diffexpo.data.export import export_pairs as write_pairs
from diffexpo.data.latents import PromptEmbeddings, host_array, pixel_decoder
from diffexpo.data.rows import MarginOfPair
from diffexpo.data.statistics import summarise_store
from diffexpo.data.store import Store
from diffexpo.errors import MissingError, PolicyError
from diffexpo.evaluation.card import Exported, write_card
from diffexpo.evaluation.records import choose_pair_examples
from diffexpo.files import SUMS, sync_tree, write_checksums
from diffexpo.online.keeping import kept_iterate
from diffexpo.online.loop import Loop
from diffexpo.online.stages.improve import redraw_improved
from diffexpo.online.units import redraw, was_merged
from diffexpo.policies.export import call_arguments, export_policy, left_out
from diffexpo.policies.family import FamilyPolicy
from diffexpo.rewards.images import to_bytes
from diffexpo.training.checkpoint import read_tensors
from diffexpo.types import Policy


def inspect(run_dir: Path, pair_id: str | None) -> dict[str, object]:
    """A pair's whole history, or a summary of the store."""
    store = Store(run_dir / "store", create=False)
    if pair_id is not None:
        return asdict(store.lineage(pair_id))
    counted = summarise_store(store)
    pairs = [pair for part in store.parts("pairs", MarginOfPair) for pair in part]
    return {
        "stages": [f"{name}-{iteration}" for name, iteration in store.completed()],
        **{name: counted[name] for name in ("samples", "samples by size", "pairs", "pairs by source")},
        "example pairs": [pair.pair_id for _, pair in choose_pair_examples(pairs)],
    }


def open_run(run_dir: Path) -> tuple[RunConfig, Store, FamilyPolicy]:
    """Configuration, store and base model of an existing run."""
    config = read_resolved(run_dir / "config.yaml").config
    return config, Store(run_dir / "store", create=False), build_policy(config)


def load_weights(run_dir: Path, policy: Policy, iteration: int, version: str) -> None:
    """Put an iterate's file into a version; p_0 is what a policy starts with, and a MissingError says that a
    later one was not trained."""
    path = iterate_path(run_dir, iteration)
    if path.exists():
        policy.weights.load(version, read_tensors(path))
    elif iteration == 0:  # only a run with `tuning.start` keeps a file of p_0; without one it is the base
        policy.weights.load(version, policy.weights.state("base"))
    else:
        reason = f"iteration {iteration} has not been trained; resume the run first"
        raise MissingError(f"{path} does not exist: {reason}")


def regenerate(run_dir: Path, sample_id: str, out: Path) -> dict[str, object]:
    """Draw a stored sample again from its row and compare with the stored latents: StoreError if there is no
    such sample or it was not drawn here, PolicyError if the weights at hand are not those that drew it."""
    config, store, policy = open_run(run_dir)
    sample = store.sample(sample_id)
    iteration = sample.iteration - (sample.agent == "main")
    origin, version = sample.improved_from, "base" if sample.agent == "base" else "current"
    if origin is None:
        drawer: Policy = policy
        load_weights(run_dir, policy, iteration, "current")
    else:
        drawer, version = restore_improver(config, run_dir, store, policy), "current"
    found = drawer.weights.fingerprint(version)
    if found != sample.weights:
        who = f"iteration {iteration}" if origin is None else "the run's improvement model"
        raise PolicyError(f"sample {sample_id} was drawn by weights {sample.weights}, {who} has {found}")
    embeddings = PromptEmbeddings(policy)
    with drawer.weights.use(version, merged=was_merged(sample)):
        if origin is None:
            latents = redraw(policy, embeddings, sample, lambda: None)
        else:
            loser = torch.from_numpy(store.latents([origin]))
            latents = redraw_improved(drawer, embeddings, sample, loser, lambda: None)
    stored, drawn = store.latent(sample_id), host_array(latents[0])
    difference = float(np.abs(drawn - stored).max())
    Image.fromarray(to_bytes(policy.decode_latents(latents))[0]).save(out)
    verdict = "identical" if np.array_equal(drawn, stored) else "different"
    return {"sample": sample_id, "picture": str(out), "latents": verdict, "largest difference": difference}


def export_pairs(run_dir: Path, target: Path) -> int:
    """All pairs as one Parquet file in the Pick-a-Pic v2 columns; returns the number of rows."""
    _, store, policy = open_run(run_dir)
    return write_pairs(store, target, pixel_decoder(policy))


def export(
    run_dir: Path, loop: Loop | None = None, iteration: int | None = None, *, whole: bool = False
) -> list[Path]:
    """The run's result for plain diffusers, reloaded and compared, and its model card; with `iteration` that
    iterate instead, in a folder of its own (a MissingError if it is not trained). `whole` writes a pipeline
    with the adapters of LoRA folded into its weights."""
    config = loop.config if loop else read_resolved(run_dir / "config.yaml").config
    if iteration is not None:
        result_path(run_dir, config, f"--iteration {iteration}", iteration)
    policy = loop.policy if loop else build_policy(config)
    assert isinstance(policy, FamilyPolicy)  # a run's policy was loaded
    chosen = kept_iterate(config, run_dir / "store") if iteration is None else iteration
    load_weights(run_dir, policy, chosen, "current")
    is_folded = whole and config.tuning.kind == "lora"
    folder = exported_folder(run_dir, iteration) / ("whole" if is_folded else "")
    title = config.name if iteration is None else f"{config.name}, iteration {iteration}"
    done: dict[str, Any] = export_policy(policy, "current", folder, title, whole=whole)
    files, arguments = [Path(file) for file in done["files"]], call_arguments(policy)
    if config.model.resolution is not None:
        nothing = torch.zeros(1, *policy.latent_shape)
        height, width = policy.decode_latents(nothing).shape[-2:]
        arguments |= {"height": height, "width": width}
    if is_folded:
        write_sums(folder)
        return files
    # What plain diffusers is told to load: the hub id that the settings name, or the folder.
    path = Path(config.model.path).expanduser()
    is_hub_id = not path.exists() and resolve_model(config.model.path) == config.model.path
    exported = Exported(
        kind=str(done["kind"]),
        pipeline_class=policy.folder.pipeline_class,
        files=tuple(file.name for file in files),
        left_out=left_out(policy),
        arguments=arguments,
        base=config.model.path if is_hub_id else str(policy.folder.path.resolve()),
        version=f"iteration-{chosen}",
    )
    card = write_card(run_dir, folder, config, exported)
    write_sums(folder)
    return [*files, card]


def write_sums(folder: Path) -> None:
    """Make an export durable, and say in SHA256SUMS (`sha256sum -c`) what it consists of."""
    sync_tree(folder)
    write_checksums(folder, exported_files(folder))


def exported_files(folder: Path) -> list[Path]:
    """The files of an export, without those of other exports in folders of their own."""
    own = [
        path for path in folder.iterdir() if not path.name.startswith("iteration-") and path.name != "whole"
    ]
    files = [file for path in own for file in (path.rglob("*") if path.is_dir() else [path])]
    return sorted(file for file in files if file.is_file() and file.name != SUMS)


def write_model(path: str) -> None:
    """Write the whole model of the run, or of the iterate, that `model.path` names, unless it is there."""
    run = run_of_model(path)
    if run is not None and not whole_model_folder(*run).is_dir():
        export(run[0], iteration=run[1], whole=True)


def push(run_dir: Path, exported: Path, repository: str, *, private: bool) -> str:
    """Upload the folder of an export, of which `exported` is the first file or the folder itself, to a
    repository of the hub; returns the address of the commit."""
    from diffexpo.policies.publishing import push_folder

    folder = exported if exported.is_dir() else exported.parent
    title = f"{run_dir.name}, exported by diffexpo"
    return push_folder(folder, repository, private=private, title=title)
