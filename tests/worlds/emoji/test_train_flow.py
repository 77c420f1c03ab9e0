"""The folded context token is the same function as 256 equal ones."""

from __future__ import annotations

import torch

from worlds.emoji.models import make_flow_text_encoders, make_flow_transformer
from worlds.emoji.tokens import make_tokenizer
from worlds.emoji.train_flow import FoldedContextProcessor, encode_captions


def test_one_folded_token_is_256_zero_tokens() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    encoders = make_flow_text_encoders(tokenizer)
    network = make_flow_transformer().eval()
    for parameter in network.parameters():  # fresh biases are zero: make them count
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x, t = torch.randn(2, 8, 8, 8), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        context, pooled = encode_captions(encoders, tokenizer, ["noto dog", "twemoji cat face"])
        padded = torch.cat([context[:, :-1], torch.zeros(2, 256, context.shape[-1])], dim=1)
        plain = network(x, padded, pooled, t, return_dict=False)[0]
        network.set_attn_processor(FoldedContextProcessor())
        folded = network(x, context, pooled, t, return_dict=False)[0]
    # One attention in place of 256 equal ones: sums of 256 terms, rounded by 6e-8 each, through a few blocks.
    torch.testing.assert_close(folded, plain, atol=2e-5, rtol=1e-5)
