"""Faults of one line, each with the test that has to notice it. test_mutants.py puts them in, one at a time.

    (name, file, text that stands in it once, what takes its place, test)

A test is one of test_olmoe in a build of the CPU machine, fast, strict (with seeds 1 to 5, as make test runs it) or bf16,
or one of pytest's.
"""
CLI, DATA, CHECKPOINT = "tests/test_cli.py::test_", "tests/test_data.py::test_", "tests/test_checkpoint.py::test_group"

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
    ("auxiliary_losses_not_over_micro_batches", "olmoe.cu", "LNK = c.L * N * c.K * micro_batches;", "LNK = c.L * N * c.K * std::min(micro_batches, 1);", "fast: model batches"),

    # ---- Dispatch, experts, combine
    ("dispatch_not_stable", "olmoe.cu", "for (int slab = 0; slab < slabs; slab++) {", "for (int slab = slabs - 1; slab >= 0; slab--) {", "fast: kernel dispatch and combine"),
    ("histogram_not_cleared", "olmoe.cu", "for (int e = lane; e < E; e += WARP) histogram[e] = 0;", "", "strict: kernel dispatch and combine"),
    ("one_token_too_many", "olmoe.cu", "if (token >= (size_t)N) return;", "if (token > (size_t)N) return;", "strict: kernel dispatch and combine"),
    ("combine_weight_of_the_row", "olmoe.cu", "weights[token * K + k] : 1.f", "weights[row_of[token * K + k]] : 1.f", "fast: kernel dispatch and combine"),
    ("swiglu_derivative", "olmoe.cu", "(1 + x * (1 - s))", "(1 + x * s)", "fast: vectors swiglu"),
    ("weight_counts_twice_in_its_gradient", "olmoe.cu", "dot += silu * up * d;", "dot += w * silu * up * d;", "fast: kernel swiglu"),

    # ---- Cross entropy
    ("ignored_target_has_gradient", "olmoe.cu", "float factor = target >= 0 ? scale : 0.f;", "float factor = scale;", "fast: kernel cross entropy"),
    ("cross_entropy_divisor", "olmoe.cu", 'o.ce_divisor == "all" ? 1 / tokens_per_step', 'o.ce_divisor != "all" ? 1 / tokens_per_step', CLI + "log"),

    # ---- AdamW, clipping, schedule, initialisation
    ("bias_correction", "olmoe.cu", "(lr / (1 - pow(beta1, (double)step)))", "lr", "fast: vectors adamw"),
    ("eps_inside_the_root", "olmoe.cu", "(sqrtf(v_new * v_scale) + eps)", "sqrtf(v_new * v_scale + eps)", "fast: kernel adamw"),
    ("norms_are_not_decayed", "olmoe.cu", "o.lr, o.beta1, o.beta2, o.eps, o.weight_decay);", "o.lr, o.beta1, o.beta2, o.eps, s.norm ? 0 : o.weight_decay);", "fast: model update"),
    ("update_of_the_rounded_weight", "olmoe.cu", "(master ? master[i] : (float)p[i]) * decay", "(float)p[i] * decay", "bf16: kernel adamw"),
    ("clipping_raises_small_gradients", "olmoe.cu", "(float)std::min(1.0, o.grad_clip / (grad_norm + 1e-6))", "(float)(o.grad_clip / (grad_norm + 1e-6))", "fast: model update"),
    ("warm_up_from_nothing", "olmoe.cu", "(0.1 + 0.9 * step / s.warmup)", "(step / s.warmup)", "fast: vectors schedule"),
    ("learning_rate_one_step_late", "olmoe.cu", "learning_rate(schedule, (double)step)", "learning_rate(schedule, (double)step - 1)", CLI + "schedules"),
    ("random_numbers_by_launch", "olmoe.cu", "philox(seed, position + i)", "philox(seed, i)", "fast: kernel init"),

    # ---- Order of what runs at the same time
    ("experts_do_not_wait_for_their_input", "olmoe.cu", "for (Stream& s : expert_streams) cudaCheck(cudaStreamWaitEvent(s.stream, main_stream.event, 0));", "", "strict: kernel experts"),
    ("experts_are_not_waited_for", "olmoe.cu", "cudaCheck(cudaStreamWaitEvent(main_stream.stream, s.event, 0));", "", "strict: kernel experts"),
    ("counts_copied_in_another_stream", "olmoe.cu", "a.counts, E * sizeof(int), cudaMemcpyDeviceToHost, main_stream.stream", "a.counts, E * sizeof(int), cudaMemcpyDeviceToHost, nullptr",
     "strict: model shapes"),
    ("lanes_do_not_meet_in_the_router", "olmoe.cu", "    __syncwarp();\n    if (normalize)", "    if (normalize)", "strict: kernel router"),
    ("lanes_do_not_meet_in_cross_entropy", "olmoe.cu", "    __syncwarp();                                               // the target's", "    // the target's", "strict: kernel cross entropy"),

    # ---- Training
    ("recompute_forgets_to_gather", "olmoe.cu", "        gather(a.expert_in, a.ffn_in, a.assignment_of, R, C, K);", "", "fast: model recompute"),
    ("resume_from_the_first_sequence", "olmoe.cu", 's.at("epoch"), s.at("position"))', 's.at("epoch"), 0)', CLI + "resume_same_bits"),
    ("resume_without_spike_window", "olmoe.cu", 'spikes->norms = s.at("skip_spikes").at("norms").get<std::vector<double>>();', "", CLI + "skip_spikes"),
    ("nan_agrees", "olmoe.cu", "bool ok = error <= tolerance;", "bool ok = !(error > tolerance);", CLI + "verify_sees_a_difference[logits-5-nan]"),

    # ---- Data
    ("shifted_label", "dataloader.h", "inputs[t + 1]", "inputs[t]", DATA + "instances_of_two_files"),
    ("filter_threshold", "dataloader.h", "31 * p)", "32 * p)", DATA + "repetition_filter"),
    ("pcg_rotation", "dataloader.h", ">> 122", ">> 121", DATA + "pcg64_outputs"),
    ("ranks_take_runs", "dataloader.h", "rank + world * row", "rank * (G / world) + row", DATA + "ranks_share_the_global_batch[2]"),

    # ---- Checkpoints
    ("file_not_synced", "checkpoint.h", "if (fsync(fd) != 0) fail();", "", CHECKPOINT + "[sync]"),
    ("directory_not_synced", "checkpoint.h", "    directory_sync(tmp);\n", "", CHECKPOINT + "[sync]"),
    ("written_in_place", "checkpoint.h", 'tmp = out_dir + "/." + name + ".tmp"', "tmp = final", CHECKPOINT + "[kill]"),
    ("checksum_not_compared", "checkpoint.h", 'sum["crc32"] != crc_text(crc)', 'sum["crc32"].empty()', CHECKPOINT + "[damage]"),
    ("header_length_not_checked", "checkpoint.h", " || header > size - 8", "", CHECKPOINT + "[safetensors]"),
    ("half_written_file_stays", "checkpoint.h", "if (!scratch.empty()) std::filesystem::remove_all(scratch, ignored);", "if (!scratch.empty()) {}", CHECKPOINT + "[full]"),
]
