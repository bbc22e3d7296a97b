"""The MoE layer: router, routing functions, noise, experts, token dispatch, metrics."""
