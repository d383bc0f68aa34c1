"""The keys of the JSON files in model and adapter folders: each is used, without effect here, or refused.

A test compares the tables with the keys that the installed transformers and peft know.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

from lorafit.errors import Problem
from lorafit.redact import logger_of

# A tuple: the key changes results in a way that lorafit does not compute, except with these values.
Rule = Literal["used", "harmless"] | tuple[object, ...]
USED: Literal["used"] = "used"
HARMLESS: Literal["harmless"] = "harmless"
UNSET: tuple[object, ...] = (None, False, [], {}, "")
_INIT_OF_RESIDUALS = ("pissa", "olora", "corda", "lora_ga", "loftq")

logger = logger_of(__name__)


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# adapter_config.json
ADAPTER: dict[str, Rule] = {
    **_all(
        USED,
        "peft_type base_model_name_or_path revision r lora_alpha lora_dropout use_rslora target_modules "
        "init_lora_weights rank_pattern alpha_pattern exclude_modules layers_to_transform layers_pattern "
        "modules_to_save use_dora bias trainable_token_indices",
    ),
    # how training begins or runs, where PEFT looks for the base, and Conv1D layers, which no supported network has
    **_all(
        HARMLESS,
        "task_type auto_mapping peft_version inference_mode fan_in_fan_out megatron_config megatron_core loftq_config "
        "eva_config corda_config lora_ga_config runtime_config ensure_weight_tying velora_config qalora_group_size",
    ),
    **_all(
        UNSET,
        "lora_bias target_parameters alora_invocation_tokens layer_replication use_qalora monteclora_config "
        "use_bdlora arrow_config kasa_config",
    ),
}
# What answers and exports take, and training with lora.init_from does not.
NOT_TRAINED = (
    "modules_to_save",
    "trainable_token_indices",
    "bias",
)

# config.json of the supported model types
CONFIG: dict[str, Rule] = {
    **_all(
        USED,
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act rms_norm_eps max_position_embeddings "
        "original_max_position_embeddings rope_theta rope_scaling rope_parameters tie_word_embeddings "
        "attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types "
        "eos_token_id quantization_config "
        "hidden_activation layers_block_type no_rope_layers no_rope_layer_interval sliding_window_pattern "
        "rope_local_base_freq use_bias position_embedding_type num_local_experts shared_intermediate_size "
        "embedding_multiplier residual_multiplier attention_multiplier logits_scaling query_pre_attn_scalar "
        "attn_logit_softcapping final_logit_softcapping use_bidirectional_attention "
        "norm_eps tie_embedding full_attn_idxs conv_L_cache block_ff_dim block_auto_adjust_ff_dim "
        "block_ffn_dim_multiplier block_multiple_of full_attention_interval linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads",
    ),
    # names, number types, caches, heads of other tasks, and the tokens that the tokenizer names too
    **_all(
        HARMLESS,
        "architectures transformers_version torch_dtype dtype _name_or_path use_cache initializer_range "
        "bos_token_id pad_token_id pretraining_tp output_hidden_states output_attentions return_dict "
        "chunk_size_feed_forward id2label label2id problem_type is_decoder auto_map "
        "_attn_implementation attn_implementation _flash_attn_2_enabled rope_interleaved is_llama_config "
        "transformers.js_config unsloth_version unsloth_fixed use_bfloat16 tokenizer_class prefix "
        "task_specific_params finetuning_task max_length do_sample temperature top_k top_p",
    ),
    # of layers and experts that no supported network has, and what transformers derives from other keys
    **_all(
        HARMLESS,
        "mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_expand mamba_n_groups "
        "mamba_n_heads mamba_proj_bias time_step_limit num_experts_per_tok output_router_logits "
        "router_aux_loss_coef _sliding_window_pattern eod_token_id embd_pdrop resid_pdrop "
        "block_dim block_norm_eps block_mlp_init_scale block_out_init_scale block_use_swiglu "
        "block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc",
    ),
    "conv_bias": (None, False),
    "attention_dropout": HARMLESS,  # for training from random weights; LoRA has a dropout of its own
    "partial_rotary_factor": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": UNSET,
}
# `rope_scaling` or `rope_parameters` in config.json
ROPE: dict[str, Rule] = {
    **_all(
        USED,
        "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow "
        "short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate",
    ),
    "finetuned": HARMLESS,
    "partial_rotary_factor": (None, 1, 1.0),
    "mrope_section": (None,),
}
# generation_config.json: options of a command decide how tokens are drawn; the ids decide where an answer ends
GENERATION: dict[str, Rule] = {
    "eos_token_id": USED,
    **_all(
        HARMLESS,
        "max_length max_new_tokens min_length min_new_tokens early_stopping max_time do_sample num_beams use_mtp "
        "use_cache cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h typical_p "
        "epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty "
        "no_repeat_ngram_size renormalize_logits remove_invalid_values exponential_decay_length_penalty "
        "num_return_sequences output_attentions output_hidden_states output_scores output_logits "
        "return_dict_in_generate pad_token_id bos_token_id encoder_no_repeat_ngram_size decoder_start_token_id "
        "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind "
        "target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile "
        "continuous_batching_config low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups "
        "prefill_chunk_size _from_model_config transformers_version guidance_scale chat_format",
    ),
    **_all(
        UNSET,
        "stop_strings bad_words_ids forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens "
        "sequence_bias token_healing watermarking_config constraints force_words_ids",
    ),
}
# tokenizer_config.json and special_tokens_map.json; each key that ends in `_token` names a token and is used
TOKENIZER: dict[str, Rule] = {
    **_all(
        USED,
        "bos_token eos_token unk_token sep_token pad_token cls_token mask_token additional_special_tokens "
        "extra_special_tokens model_specific_special_tokens added_tokens_decoder add_bos_token legacy chat_template",
    ),
    # how texts are padded, cut and cleaned outside of a prompt, and what tokenizer.json says in full
    **_all(
        HARMLESS,
        "tokenizer_class tokenizer_file name_or_path model_max_length max_len max_length padding_side "
        "truncation_side padding truncation stride truncation_strategy pad_to_multiple_of pad_token_type_id "
        "clean_up_tokenization_spaces clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output "
        "spaces_between_special_tokens model_input_names special_tokens_map_file use_default_system_prompt "
        "sp_model_kwargs add_eos_token add_prefix_space errors vocab merges vocab_file merges_file unk_id "
        "post_processor backend is_local local_files_only files_loaded processor_class verbose auto_map "
        "use_fast from_slow device_map response_schema response_template chat_control_tokens gguf_file "
        "fix_mistral_regex tokenizer tokenizer_object tokenizer_padding tokenizer_truncation _json_padding "
        "_json_truncation _spm_precompiled_charsmap init_inputs _commit_hash unsloth_version",
    ),
    "split_special_tokens": (None, False),
    "do_lower_case": (None, False),
}


def refused(raw: Mapping[str, Any], rules: Mapping[str, Rule], place: str, hint: str = "") -> list[Problem]:
    """A problem for each key of `raw` with a value that lorafit does not support. Keys without a rule are named once
    on standard error, if they have a value.
    """
    is_new = {key for key, value in raw.items() if key not in rules and value not in UNSET}
    if names := sorted(key for key in is_new if not key.endswith("_token")):
        _name(place, ", ".join(names))
    return [
        Problem(f"`{key}` is {repr(raw[key])[:60]}, which lorafit does not support", place, hint)
        for key, rule in rules.items()
        if isinstance(rule, tuple) and key in raw and raw[key] not in rule
    ]


@functools.cache  # each file is read several times
def _name(place: str, names: str) -> None:
    logger.warning("note: keys that lorafit does not know are not used: %s (%s)", names, place)


def residual_init(value: object) -> str:
    """The kind of an `init_lora_weights` that takes part of the base's weights into the adapter, "" for others."""
    text = value.lower() if isinstance(value, str) else ""
    return next((kind for kind in _INIT_OF_RESIDUALS if text.startswith(kind)), "")
