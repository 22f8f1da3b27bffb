"""The config.json of the models that Qwen published, in the official layout, and how many parameters they have.

Kept is all that a shape, a tower or a mapping depends on. Counts are those of the model page, which are half the bytes
of the safetensors index: tied weights are stored, and counted, once. Knows nothing of this package.
"""

from __future__ import annotations

from typing import Any

_IDS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_QWEN2_5: dict[str, Any] = {
    **_IDS,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
}
_QWEN2_5_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
# As far as is known the files of 32B and 72B leave out what transformers takes anyway: depth, heads, patches, windows.
_QWEN2_5_VISION_SHORT: dict[str, Any] = {
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3456,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
_QWEN3_TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "attention_bias": False,
}
_EXPERTS_TEXT: dict[str, Any] = {
    **_QWEN3_TEXT,
    "model_type": "qwen3_vl_moe_text",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_QWEN3_VISION: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
    "hidden_act": "gelu_pytorch_tanh",
}
_QWEN3_VISION_SMALL: dict[str, Any] = {
    **_QWEN3_VISION,
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN3: dict[str, Any] = {
    **_IDS,
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
}
_EXPERTS: dict[str, Any] = {
    **_IDS,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B-Instruct": {
        **_QWEN2_5,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
    },
    "Qwen2.5-VL-7B-Instruct": {
        **_QWEN2_5,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
    },
    "Qwen2.5-VL-32B-Instruct": {
        **_QWEN2_5,
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN2_5_VISION_SHORT, "out_hidden_size": 5120},
    },
    "Qwen2.5-VL-72B-Instruct": {
        **_QWEN2_5,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN2_5_VISION_SHORT, "out_hidden_size": 8192},
    },
    "Qwen3-VL-2B-Instruct": {
        **_QWEN3,
        "tie_word_embeddings": True,
        "text_config": {
            **_QWEN3_TEXT,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "vision_config": {**_QWEN3_VISION_SMALL, "out_hidden_size": 2048},
    },
    "Qwen3-VL-4B-Instruct": {
        **_QWEN3,
        "tie_word_embeddings": True,
        "text_config": {
            **_QWEN3_TEXT,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "vision_config": {**_QWEN3_VISION_SMALL, "out_hidden_size": 2560},
    },
    "Qwen3-VL-8B-Instruct": {
        **_QWEN3,
        "tie_word_embeddings": False,
        "text_config": {
            **_QWEN3_TEXT,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision_config": {**_QWEN3_VISION, "out_hidden_size": 4096},
    },
    "Qwen3-VL-32B-Instruct": {
        **_QWEN3,
        "tie_word_embeddings": False,
        "text_config": {
            **_QWEN3_TEXT,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        "vision_config": {**_QWEN3_VISION, "out_hidden_size": 5120},
    },
    "Qwen3-VL-30B-A3B-Instruct": {
        **_EXPERTS,
        "tie_word_embeddings": False,
        "text_config": {
            **_EXPERTS_TEXT,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        "vision_config": {**_QWEN3_VISION, "model_type": "qwen3_vl_moe", "out_hidden_size": 2048},
    },
    "Qwen3-VL-235B-A22B-Instruct": {
        **_EXPERTS,
        "tie_word_embeddings": False,
        "text_config": {
            **_EXPERTS_TEXT,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
        },
        "vision_config": {**_QWEN3_VISION, "model_type": "qwen3_vl_moe", "out_hidden_size": 4096},
    },
}
"""Model -> its config.json."""

PUBLISHED: dict[str, int | None] = {
    # Hugging Face model page / safetensors index of Qwen/<name>. Marked *: as others record that index, or that of a
    # checkpoint with the same shapes. Of 72B only the rounded "73B" is public.
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,  # *
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,  # *
    "Qwen2.5-VL-72B-Instruct": None,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-32B-Instruct": 33_357_390_064,  # *
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,  # *
    "Qwen3-VL-235B-A22B-Instruct": 235_670_022_896,  # *
}
"""Model -> its parameters, vision included; None where no exact count is public."""
