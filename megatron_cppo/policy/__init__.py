"""The trained model: the only folder that imports Megatron-Core. Enter through `policy.policy.Policy`."""
