"""Faults of one line, each with the test that has to notice it. test_mutants.py puts them in, one at a time.

    (name, file, text that stands in it once, what takes its place, test)

A test is one of test_olmoe in a build of the CPU machine, fast, strict (with seeds 1 to 5, as make test runs it) or bf16, or strict on two ranks,
or one of pytest's.
"""
CLI, DATA, TOKENIZER, CHECKPOINT = "tests/test_cli.py::test_", "tests/test_data.py::test_", "tests/test_tokenizer.py::test_", "tests/test_checkpoint.py::test_group"

MUTANTS = [
    # ---- Embedding, norms, rotation
    ("embedding_gradient_overwrites", "olmoe.cu", "(floatX)((float)dw[column + c * WARP] + sum[c])", "(floatX)sum[c]", "fast: kernel embedding"),
    ("norm_gradient_overwrites", "olmoe.cu", "dw[i] = (floatX)((float)dw[i] + sum);", "dw[i] = (floatX)sum;", "fast: kernel rmsnorm"),
    ("qk_norm_mean_over_a_head", "olmoe.cu", "        float term2 = warp_sum(dot) / C * scale * scale;", "        float term2 = warp_sum(dot) / D * scale * scale;", "fast: kernel qk-norm and rope"),
    ("rope_turns_backwards", "olmoe.cu", "(float)sin((double)angle)", "(float)sin(-(double)angle)", "fast: vectors rope"),

    # ---- Matmuls and attention
    ("weight_gradient_overwrites", "olmoe.cu", "O, I, N, 1, 1);", "O, I, N, 1, 0);", "fast: kernel linear"),
    ("causal_mask_one_late", "olmoe.cu", "for (int j = t + 1 + lane; j < S; j += WARP) probs[j] = (floatX)0.f;", "for (int j = t + 2 + lane; j < S; j += WARP) probs[j] = (floatX)0.f;",
     "strict: kernel attention"),
    ("softmax_gradient_without_delta", "olmoe.cu", "(dprobs[j] - delta)", "dprobs[j]", "fast: kernel attention"),
    ("key_gradients_of_blocks_overwrite", "olmoe.cu", "float add = S == T ? 0.f : 1.f;", "float add = 0.f;", "fast: kernel attention"),

    # ---- Router and its losses
    ("tie_to_the_higher_id_between_lanes", "olmoe.cu", "(other == v && other_index < index)", "(other == v && other_index > index)", "strict: model ties"),
    ("tie_to_the_higher_id_in_a_lane", "olmoe.cu", "(z[i] > best || best_id == E)", "(z[i] >= best || best_id == E)", "fast: model ties"),
    ("router_lse_without_max", "olmoe.cu", "lse[row] = max + logf(sum)", "lse[row] = logf(sum)", "fast: kernel router"),
    ("softmax_term_of_unselected_experts", "olmoe.cu", "(g[i] - dot + z_term)", "(g[i] - (g[i] == lb_scale * (float)counts[i] ? 0.f : dot) + z_term)", "fast: kernel router"),
    ("normalized_weights_without_mean", "olmoe.cu", "(dw[k] - mean) / chosen", "dw[k] / chosen", "fast: kernel router"),
    ("load_balancing_ignores_counts", "olmoe.cu", "lb_scale * (float)counts[i];", "lb_scale * (float)(counts[i] > 0);", "fast: kernel router"),
    ("z_loss_gradient_not_over_K", "olmoe.cu", "(float)(2 * z_coef / LNK)", "(float)(2 * z_coef * c.K / LNK)", "fast: gradient with raised coefficients"),
    ("auxiliary_losses_not_over_micro_batches", "olmoe.cu", "c.K * micro_batches * world.size,", "c.K * std::min(micro_batches, 1) * world.size,", "fast: model batches"),

    # ---- Dispatch, experts, combine
    ("dispatch_not_stable", "olmoe.cu", "for (int slab = 0; slab < slabs; slab++) {", "for (int slab = slabs - 1; slab >= 0; slab--) {", "fast: kernel dispatch and combine"),
    ("histogram_not_cleared", "olmoe.cu", "for (int e = lane; e < E; e += WARP) histogram[e] = 0;", "", "strict: kernel dispatch and combine"),
    ("one_token_too_many", "olmoe.cu", "if (token >= (size_t)N) return;", "if (token > (size_t)N) return;", "strict: kernel dispatch and combine"),
    ("combine_weight_of_the_row", "olmoe.cu", "weights[token * K + k] : 1.f", "weights[row_of[token * K + k]] : 1.f", "fast: kernel dispatch and combine"),
    ("swiglu_derivative", "olmoe.cu", "(1 + x * (1 - s))", "(1 + x * s)", "fast: vectors swiglu"),
    ("weight_counts_twice_in_its_gradient", "olmoe.cu", "dot += silu * up * d;", "dot += w * silu * up * d;", "fast: kernel swiglu"),

    # ---- Cross entropy
    ("ignored_target_has_gradient", "olmoe.cu", "float factor = target >= 0 ? scale : 0.f;", "float factor = scale;", "fast: kernel cross entropy"),
    ("cross_entropy_divisor", "olmoe.cu", 'if (o.ce_divisor == "valid") ce_scale', 'if (o.ce_divisor != "valid") ce_scale', CLI + "log"),

    # ---- AdamW, clipping, schedule, initialisation
    ("bias_correction", "olmoe.cu", "(lr / (1 - pow(beta1, (double)step)))", "lr", "fast: vectors adamw"),
    ("eps_inside_the_root", "olmoe.cu", "(sqrtf(v_new * v_scale) + eps)", "sqrtf(v_new * v_scale + eps)", "fast: kernel adamw"),
    ("norms_are_not_decayed", "olmoe.cu", "o.eps, o.weight_decay, o.seed", "o.eps, s.norm ? 0 : o.weight_decay, o.seed", "fast: model update"),
    ("update_of_the_rounded_weight", "olmoe.cu", "master_of(const float* master, const floatX*) { return *master; }", "master_of(const float*, const floatX* p) { return (float)*p; }", "bf16: kernel adamw"),
    ("remainder_without_its_carry", "olmoe.cu", " - (remainder->bits >> 15)) << 16", ") << 16", "bf16: kernel adamw"),
    ("halves_rounded_down", "olmoe.cu", "HALF_AWAY = 0x8000", "HALF_AWAY = 0x7fff", "bf16: kernel adamw"),
    ("weights_without_masters_rounded_to_nearest", "olmoe.cu", "no_master ? random.x[2] & 0xffff : HALF_AWAY", "HALF_AWAY", "bf16: kernel adamw"),
    ("moments_rounded_to_nearest", "olmoe.cu", "store(m + i, m_new, random.x[0] & 0xffff);", "store(m + i, m_new, HALF_AWAY);", "fast: model state"),
    ("moments_rounded_alike", "olmoe.cu", "random.x[1] & 0xffff", "random.x[0] & 0xffff", "fast: model state"),
    ("random_rounding_alike_in_each_step", "olmoe.cu", "philox(seed, position + i, step)", "philox(seed, position + i)", "bf16: kernel adamw"),
    ("random_rounding_alike_in_each_tensor", "olmoe.cu", "o.weight_decay, o.seed, s.offset + begin);", "o.weight_decay, o.seed, begin);", "bf16: model state"),
    ("clipping_raises_small_gradients", "olmoe.cu", "(float)std::min(1.0, o.grad_clip / (grad_norm + 1e-6))", "(float)(o.grad_clip / (grad_norm + 1e-6))", "fast: model update"),
    ("warm_up_from_nothing", "olmoe.cu", "(0.1 + 0.9 * step / s.warmup)", "(step / s.warmup)", "fast: vectors schedule"),
    ("learning_rate_one_step_late", "olmoe.cu", "learning_rate(schedule, (double)step)", "learning_rate(schedule, (double)step - 1)", CLI + "schedules"),
    ("random_numbers_by_launch", "olmoe.cu", "philox(seed, position + i)", "philox(seed, i)", "fast: kernel init"),

    # ---- Order of what runs at the same time
    ("experts_do_not_wait_for_their_input", "olmoe.cu", "{ cudaCheck(cudaStreamWaitEvent(s.stream, main_stream.event, 0)); waited(s.stream); }", "waited(s.stream);", "strict: kernel experts"),
    ("experts_are_not_waited_for", "olmoe.cu", "cudaCheck(cudaStreamWaitEvent(main_stream.stream, s.event, 0));", "", "strict: kernel experts"),
    ("counts_copied_in_another_stream", "olmoe.cu", "copy_to_host(counts, a.counts, E);",
     "cudaCheck(cudaMemcpyAsync(counts, a.counts, E * sizeof(int), cudaMemcpyDeviceToHost, nullptr)); cudaCheck(cudaStreamSynchronize(nullptr));", "strict: model shapes"),
    ("lanes_do_not_meet_in_the_router", "olmoe.cu", "    __syncwarp();\n    if (normalize)", "    if (normalize)", "strict: kernel router"),
    ("lanes_do_not_meet_in_cross_entropy", "olmoe.cu", "    __syncwarp();                                               // the target's", "    // the target's", "strict: kernel cross entropy"),

    # ---- Several ranks
    ("collectives_do_not_wait_for_kernels", "olmoe.cu", "    cudaCheck(cudaStreamWaitEvent(comm_stream, main_stream.event, 0));\n", "", "ranks: ranks model"),
    ("kernels_do_not_wait_for_collectives", "olmoe.cu", "    cudaCheck(cudaStreamWaitEvent(main_stream.stream, comm_event, 0));\n", "", "ranks: ranks model"),
    ("rows_sent_before_they_are_there", "olmoe.cu", "    comm_after_main();\n    collective(name, layer, ROWS", "    collective(name, layer, ROWS", "ranks: ranks model"),
    ("rows_read_before_they_are_there", "olmoe.cu", "    });\n    main_after_comm();\n}", "    });\n}", "ranks: ranks model"),
    ("global_counts_not_waited_for", "olmoe.cu", "        });\n        main_after_comm();\n    }\n    olmoe_classify(m, a.x", "        });\n    }\n    olmoe_classify(m, a.x", "ranks: ranks model"),
    ("gradients_summed_too_early", "olmoe.cu", "        comm_after_main();\n        collective(expert ? \"reduction", "        collective(expert ? \"reduction", "ranks: ranks model"),
    ("parameters_gathered_too_early", "olmoe.cu", "        comm_after_main();\n        collective(expert ? \"gathering", "        collective(expert ? \"gathering", "ranks: ranks zero"),
    ("last_gradients_not_waited_for", "olmoe.cu", "reduce_gradients(m, 0, FIRST_LAYER_TENSOR, -1); main_after_comm(); }", "reduce_gradients(m, 0, FIRST_LAYER_TENSOR, -1); }", "ranks: ranks model"),
    ("parameters_not_waited_for", "olmoe.cu", "    if (zero) main_after_comm();\n", "", "ranks: ranks zero"),
    ("rows_of_ranks_in_reverse", "olmoe.cu", "for (int g = 0; g < G; row += arrivals[g++ * mine + e])", "for (int g = G - 1; g >= 0; row += arrivals[g-- * mine + e])", "ranks: ranks exchange"),
    ("auxiliary_losses_not_over_ranks", "olmoe.cu", "c.K * micro_batches * world.size, lb_tokens", "c.K * micro_batches, lb_tokens", "ranks: ranks model"),
    ("weights_stay_at_home", "olmoe.cu", "exchange_rows(s.arrived_weights, s.row_weights, counts, arrivals, E, 1, false, \"weights to the experts\", l);", "", "ranks: ranks model"),
    ("share_of_the_first_rank", "olmoe.cu", "size_t begin = s.update_begin(), n = s.update_count();", "size_t begin = zero ? 0 : s.update_begin(), n = s.update_count();", "ranks: ranks zero"),

    # ---- Generation
    ("cache_of_another_slot", "olmoe.cu", "*v = values + cached", "*v = values + (row * H + head) * P * D", "fast: model cache"),
    ("rotation_of_the_first_position", "olmoe.cu", "size_t position = positions ? positions[row] : row % T;", "size_t position = row % T;", "fast: model cache"),
    ("last_tokens_turned_as_the_first", "olmoe.cu", "copy_to_device(m->cache.positions, last_position.data(), B);", "", "fast: model cache"),
    ("last_of_the_filled_prompt", "olmoe.cu", "last[b] = b * T + last_position[b]", "last[b] = b * T + T - 1", "fast: model cache"),
    ("top_p_forgets_the_temperature", "olmoe.cu", "kept >= o.top_p * total", "kept >= o.top_p", "fast: sampling"),

    # ---- Training
    ("recompute_forgets_to_gather", "olmoe.cu", "        gather(G > 1 ? s.routed : a.expert_in, a.ffn_in, a.assignment_of, R, C, K);\n        if", "        if", "fast: model recompute"),
    ("resume_from_the_first_sequence", "olmoe.cu", 's.at("epoch"), s.at("position"))', 's.at("epoch"), 0)', CLI + "resume_same_bits"),
    ("resume_without_spike_window", "olmoe.cu", 'spikes->norms = s.at("skip_spikes").at("norms").get<std::vector<double>>();', "", CLI + "skip_spikes"),
    ("nan_agrees", "commands/verify.h", "bool ok = error <= tolerance;", "bool ok = !(error > tolerance);", CLI + "verify_sees_a_difference[logits-5-nan]"),

    # ---- Data
    ("shifted_label", "dataloader.h", "inputs[t + 1]", "inputs[t]", DATA + "instances_of_two_files"),
    ("filter_threshold", "dataloader.h", "31 * p)", "32 * p)", DATA + "repetition_filter"),
    ("pcg_rotation", "dataloader.h", ">> 122", ">> 121", DATA + "pcg64_outputs"),
    ("ranks_take_runs", "dataloader.h", "rank + world * row", "rank * (G / world) + row", DATA + "ranks_share_the_global_batch[2]"),
    ("batches_as_they_come", "commands/tokenize.h", " && due->first == pool->written", "", DATA + "tokenize_any_number_of_threads"),
    ("goes_on_behind_what_was_not_saved", "commands/tokenize.h", "ftruncate(file, (off_t)bytes) != 0 || ", "", DATA + "full_disk_loses_nothing"),
    ("document_fills_a_file_to_the_limit", "commands/tokenize.h", "w->part_tokens + left >= limit", "w->part_tokens + left > limit", DATA + "tokenize_document_that_reaches_the_limit"),
    ("pieces_cut_in_white_space", "commands/tokenize.h", " || white_space(*piece, 0, i, false)", "", DATA + "pieces_of_a_long_text"),

    # ---- Tokenizer
    ("white_space_keeps_its_last", "tokenizer.h", "q < end && last > p ? last : q", "q < end && last < p ? last : q", TOKENIZER + "nasty"),
    ("same_class_does_not_block", "tokenizer.h", "u.combining[c.back()] < combining)", "u.combining[c.back()] <= combining)", TOKENIZER + "nasty"),
    ("words_alike_in_eight_bytes", "tokenizer.h", " || c->words[i].high != high)", " || (c->words[i].high ^ high) >> 56)", TOKENIZER + "words_alike"),
    ("left_pair_keeps_its_rank", "tokenizer.h", "if (i > 0) pair_with_next(s[i].previous);", "", TOKENIZER + "long_words"),
    ("stream_ends_within_a_character", "tokenizer.h", "if (partial && pending) {", "if (partial && pending && n < -1) {", TOKENIZER + "stream"),

    # ---- Checkpoints
    ("file_not_synced", "lib/checkpoint.h", "fsync(fd) != 0 || ", "", CHECKPOINT + "[sync]"),
    ("directory_not_synced", "lib/checkpoint.h", "    directory_sync(plan.tmp);\n", "", CHECKPOINT + "[sync]"),
    ("written_in_place", "lib/checkpoint.h", 'tmp = out_dir + "/." + name + ".tmp"', "tmp = plan.final", CHECKPOINT + "[kill]"),
    ("checksum_not_compared", "lib/checkpoint.h", 'sum["crc32"] != crc_text(crc)', 'sum["crc32"].empty()', CHECKPOINT + "[damage]"),
    ("header_length_not_checked", "lib/safetensors.h", " || header > size - 8", "", CHECKPOINT + "[safetensors]"),
    ("half_written_file_stays", "lib/checkpoint.h", "std::filesystem::remove_all(scratch, ignored);", "", CHECKPOINT + "[full]"),
    ("piece_of_another_rank_misplaced", "lib/checkpoint.h", "w.write(buffer.data(), p.bytes, p.at);", "w.write(buffer.data(), p.bytes, p.at - savers.rank);", CHECKPOINT + "[ranks]"),
    ("checksums_combined_in_the_wrong_order", "lib/checkpoint.h", "crc32_combine(crc, (uLong)crcs[i],", "crc32_combine((uLong)crcs[i], crc,", CHECKPOINT + "[ranks]"),
    ("numbers_that_are_not_finite_are_saved", "lib/checkpoint.h", "(upper & 0x7f80) != 0x7f80", "true", CHECKPOINT + "[roundtrip]"),

    # ---- The command line
    ("screen_that_goes_away_ends_training", "olmoe.cu", "signal(SIGPIPE, SIG_IGN);", "", CLI + "screen_that_goes_away"),
    ("two_runs_share_a_directory", "olmoe.cu", "LOCK_EX | LOCK_NB", "LOCK_SH | LOCK_NB", CLI + "two_runs_in_one_directory"),
    ("validation_data_is_read_too_late", "olmoe.cu", "if (!o.val.empty()) dataloader_check", "if (false) dataloader_check", CLI + "validation_is_checked_before_training"),
]
