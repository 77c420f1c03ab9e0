"""What the training methods are called in texts that people read. Imports without torch."""

from __future__ import annotations

METHOD_NAMES = {
    "expo": "EXPO",
    "diffusion_dpo": "Diffusion-DPO",
    "improvement_dpo": "Improvement DPO",
    "spin": "SPIN-Diffusion",
    "mapo": "MaPO",
    "sft": "SFT",
    "diffusion_kto": "Diffusion-KTO",
    "rwr": "RWR",
    "diffusion_nft": "DiffusionNFT",
    "awm": "AWM",
    "dgpo": "DGPO",
    "ddpo": "DDPO",
    "dpok": "DPOK",
    "d3po": "D3PO",
    "spo": "SPO",
    "prdp": "PRDP",
    "flow_grpo": "Flow-GRPO",
}


def method_name(method: str) -> str:
    """The name of a method as its paper writes it.

    Args:
        method: A value of `algorithm.type`.
    Returns:
        `method_name("ddpo")` is "DDPO"; what the table does not hold is returned as it is.
    """
    return METHOD_NAMES.get(method, method)
