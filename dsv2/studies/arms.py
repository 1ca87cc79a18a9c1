"""The studies: for each, the arms by name and the overrides that make an arm of experiment=study/NAME."""


def _grain(split: int, shared: bool) -> list[str]:
    """Return the overrides that cut each expert into `split`, at the same total and active parameters.

    Unsplit, a layer has 8 experts of width 704 and a token uses 2. With `shared`, one of the 8 always runs.
    """
    routed = 7 if shared else 8
    chosen = 1 if shared else 2
    return [
        f"model.moe_intermediate_size={704 // split}",
        f"model.n_routed_experts={routed * split}",
        f"model.num_experts_per_tok={chosen * split}",
        f"model.n_shared_experts={split if shared else 0}",
    ]


_ALPHAS = "model.balance.alpha_{}=0.0"
STUDIES: dict[str, dict[str, list[str]]] = {
    "balance": {
        "off": [_ALPHAS.format(loss) for loss in ("expert", "device", "comm")],
        "expert": [_ALPHAS.format(loss) for loss in ("device", "comm")],
        "all": [],
        "all-dropping": ["model.balance.token_dropping=true"],
    },
    "granularity": {
        f"{split}x{'-shared' if shared else ''}": _grain(split, shared)
        for shared in (False, True)
        for split in (1, 2, 4, 8)
    },
    # The numbers of heads make every attention about as large as MHA with 8 heads. The matrices of mha, gqa
    # and mqa have 2 x hidden_size x 64 x (heads + key heads) parameters.
    "attention": {
        "mla": ["model.attention=mla", "model.num_attention_heads=10"],
        "mha": ["model.attention=mha", "model.num_attention_heads=8"],
        "gqa": ["model.attention=gqa", "model.num_attention_heads=12", "model.num_key_value_heads=4"],
        "mqa": ["model.attention=mqa", "model.num_attention_heads=15"],
    },
}
