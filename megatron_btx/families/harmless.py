"""The fields of ``config.json`` that do not change what a model computes."""

_NAMES = """
    architectures model_type _name_or_path name_or_path model_name transformers_version
    _commit_hash torch_dtype dtype unsloth_version unsloth_fixed

    use_cache return_dict output_hidden_states output_attentions torchscript
    _attn_implementation _attn_implementation_autoset attn_implementation
    chunk_size_feed_forward use_bfloat16 is_encoder_decoder is_decoder pruned_heads
    add_cross_attention tie_encoder_decoder cross_attention_hidden_size problem_type
    id2label label2id finetuning_task task_specific_params tf_legacy_loss

    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id prefix
    decoder_start_token_id tokenizer_class max_length min_length do_sample
    temperature top_k top_p typical_p repetition_penalty length_penalty
    num_beams num_beam_groups num_return_sequences diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids early_stopping
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id remove_invalid_values output_scores
    return_dict_in_generate

    output_router_logits router_aux_loss_coef pretraining_tp
"""
HARMLESS = frozenset(_NAMES.split())
"""Where it comes from; how it is run; tokens and generation; training only. ``pretraining_tp`` cuts
products into pieces, which changes their rounding alone. An unknown field that is null, false or
empty counts as absent."""
