"""A method that breaks a promise fails the check of that promise, with a reason of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtura.authoring.contracts import run
from mixtura.authoring.scaffold import new_method
from mixtura.errors import UserError
from mixtura.methods import kinds

CONNECT = """import socket
try:
    socket.socket().connect(("127.0.0.1", 9))
except OSError:
    pass
"""

STORED = "self.seed = seed\n        "
UNSAVED = STORED + 'self.register_buffer("unsaved", torch.ones(1), persistent=False)\n'
FROZEN = STORED + "self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)\n"
UNUSED = STORED + "self.unused = torch.nn.Parameter(torch.ones(1))\n"
STALE = """kept = vars(self).setdefault("kept", self.weight.detach().clone())
        logits = (1 + (self.weight - kept).sum()) * F"""

RUN = """    def run(self, rows):
        from mixtura.methods.experts._shared import grouped
        from mixtura.types import Ran

        hidden = torch.relu(grouped(rows.gathered, self.gate_up_proj, rows.offsets))
        return Ran(WHAT)

    def matrices(self)"""
MADE = "grouped(hidden, self.down_proj, rows.offsets)"
RUN_WRONG = RUN.replace("WHAT", f"2 * {MADE}")
RUN_TOGETHER = RUN.replace("WHAT", f"(1 + rows.x.mean()) * {MADE}")
KEEP_SIZE = """    def rescale(self, deviation):
        pass

    def matrices(self)"""
NO_PASSES = """    @property
    def num_passes(self):
        return 0

    def forward("""
UNSAVED_SCALE = """self.register_buffer("unsaved", torch.full((1,), float(seed)), persistent=False)
        self.seed, generator ="""
FORGETS = "torch.full((shape.d_model,), float(id(self) % 97))"
OWN_SIZE = """nn.Parameter(torch.ones(shape.d_model))
        self.wide = nn.Parameter(torch.ones(2, 2))"""
RAGGED = (
    '__import__("mixtura.methods.analyses", fromlist=["Table"])'
    '.Table(title="Ragged", columns=("one",), rows=((1, 2),))'
)

# kind, the check that must fail, what to replace in a new method of the kind, and by what.
BROKEN = [
    ("adapters", "check_starts_as_the_base", "low_rank(self.a, self.b,", "low_rank(self.a, self.b + 1,"),
    ("adapters", "check_tags_are_known", '"mergeable"', '"mergable"'),
    ("adapters", "check_merges", "del inputs", "self.b.data.mul_(1 + (len(inputs.x) == 0))"),
    (
        "adapters",
        "check_only_the_adapter_learns",
        "low_rank(self.a, self.b,",
        "low_rank(self.a.detach(), self.b,",
    ),
    ("adapters", "check_another_site_is_refused", "super().__init__(site)", "torch.nn.Module.__init__(self)"),
    ("routers", "check_header", '"title": "Mine"', '"title": ""'),
    ("routers", "check_class_is_final", "@final\n", ""),
    ("routers", "check_docstring_sections", "Shapes:", "Sizes:"),
    ("routers", "check_docstring_sections", '"paper": None', '"paper": 1'),
    ("balancers", "check_docstring_sections", "Raises:", "Refuses:"),
    ("routers", "check_docstring_sections", "    Example:", "    Raises:\n        Nothing.\n\n    Example:"),
    ("routers", "check_doctest", "        4\n", "        5\n"),
    ("routers", "check_doctest", ">>> ", ""),
    ("routers", "check_import_is_quiet", "METHOD =", "torch.rand(1)\nMETHOD ="),
    ("routers", "check_import_is_quiet", "METHOD =", CONNECT + "METHOD ="),
    ("routers", "check_settings_have_defaults", "seed: int = 0", "seed: int = 0, more=1"),
    ("routers", "check_settings_are_stored", "self.seed = seed\n", "self.number = seed\n"),
    ("routers", "check_settings_are_stored", "self.seed = seed\n", "self.seed = str(seed)\n"),
    ("balancers", "check_bad_settings_are_refused", "0, 1e6)", "0, 1e6) if coefficient > 0 else None"),
    ("routers", "check_same_input_same_result", "scores = logits", "scores = torch.rand(1) + logits"),
    ("routers", "check_inputs_are_unchanged", "logits = F", "inputs.x.mul_(2)\n        logits = F"),
    ("routers", "check_global_randomness_is_untouched", "logits = F", "torch.rand(1)\n        logits = F"),
    ("routers", "check_routing_is_whole", "(chosen, weights,", "(chosen, weights / 0,"),
    ("routers", "check_routing_is_whole", "(chosen, weights,", "(chosen[:, [0, 0]], weights[:, [0, 0]],"),
    ("routers", "check_tags_are_known", '["token_', '["reads:y", "token_'),
    ("routers", "check_tags_are_known", '["token_', '["tkn_'),
    ("routers", "check_disallowed_experts_are_not_chosen", '["token_', '["reads:allowed", "token_'),
    ("routers", "check_causal", "logits = F", "logits = (1 + inputs.x.mean()) * F"),
    ("routers", "check_batch_invariant", "logits = F", "logits = (1 + inputs.x.mean()) * F"),
    ("routers", "check_padding_gets_no_expert", "valid=inputs.valid", "valid=inputs.valid | True"),
    (
        "routers",
        "check_padding_gets_no_expert",
        "logits.softmax(-1)",
        "(logits - logits.mean(0)).softmax(-1)",
    ),
    ("routers", "check_few_tokens", "logits = F", "inputs.x.amax()\n        logits = F"),
    ("routers", "check_reads_only_declared_fields", "logits = F", "logits = inputs.step + 1 * F"),
    ("routers", "check_weights_sum_to_one", '["token_', '["normalized", "token_'),
    ("routers", "check_tokens_are_independent", "(chosen, weights,", "(chosen, weights.cumsum(0),"),
    ("routers", "check_gradient_reaches_every_parameter", "(chosen, weights,", "(chosen, weights.detach(),"),
    (
        "routers",
        "check_gradient_matches_differences",
        "(chosen, weights,",
        "(chosen, 2 * weights - weights.detach(),",
    ),
    ("routers", "check_low_precision", "logits = F", "logits = inputs.x.float() @ self.weight.T + F"),
    ("routers", "check_state_dict_round_trip", "logits = F", "logits = id(self) // 16 % 99991 * F"),
    (
        "routers",
        "check_any_number_of_experts",
        "logits = F",
        "assert len(self.weight) < 100\n        logits = F",
    ),
    ("routers", "check_any_seed", "(shape, seed)", "(shape, 0)"),
    (
        "routers",
        "check_any_seed",
        "self.seed = seed\n",
        "self.seed = seed\n        torch.Generator().manual_seed(seed)\n",
    ),
    (
        "routers",
        "check_extreme_tokens",
        "(chosen, weights,",
        "(chosen, weights * logits.exp().sum(-1, keepdim=True) ** 0,",
    ),
    (
        "routers",
        "check_vanishing_scores",
        "logits.softmax(-1)",
        "logits.exp() / logits.exp().sum(-1, keepdim=True)",
    ),
    ("routers", "check_made_without_memory", "self.seed = seed\n", UNSAVED),
    ("routers", "check_frozen_values_are_buffers", "self.seed = seed\n", FROZEN),
    ("routers", "check_autocast", "    @full_precision()\n", ""),
    ("routers", "check_tokens_of_another_dtype", "self.weight.to(x)", "self.weight"),
    ("routers", "check_evaluation_after_a_step", "logits = F", STALE),
    ("routers", "check_no_parameter_is_left_out", "self.seed = seed\n", UNUSED),
    ("routers", "check_logits_give_scores", "logits=logits", "logits=2 * logits"),
    (
        "routers",
        "check_wrong_sizes_are_refused",
        "    @full_precision()\n",
        "    __call__ = torch.nn.Module.__call__\n\n    @full_precision()\n",
    ),
    ("experts", "check_tags_are_known", '"materialises", ', ""),
    ("experts", "check_tags_are_known", '"own_matrices"', '"own_matrixes"'),
    ("experts", "check_outputs_are_whole", "self.down_proj, curve", "self.down_proj / 0, curve"),
    ("experts", "check_a_layer_weighs_them", "self.down_proj, curve", "self.down_proj / 0, curve"),
    ("experts", "check_any_seed", "begun(seed)", "begun(0)"),
    (
        "experts",
        "check_low_precision",
        "self.down_proj, curve",
        "(1 + ('b' in str(self.down_proj.dtype))) * self.down_proj, curve",
    ),
    ("experts", "check_state_dict_round_trip", "self.seed = seed\n", UNSAVED),
    ("experts", "check_frozen_values_are_buffers", "self.seed = seed\n", FROZEN),
    ("experts", "check_gradient_reaches_every_parameter", "self.seed = seed\n", UNUSED),
    (
        "experts",
        "check_gradient_reaches_every_parameter",
        "self.down_proj, curve",
        "self.down_proj.detach(), curve",
    ),
    ("experts", "check_equals_a_plain_loop", "    def matrices(self)", RUN_WRONG),
    ("experts", "check_rows_and_matrices_agree", "    def matrices(self)", RUN_WRONG),
    ("experts", "check_rows_are_independent", "    def matrices(self)", RUN_TOGETHER),
    ("experts", "check_causal", "    def matrices(self)", RUN_TOGETHER),
    ("experts", "check_batch_invariant", "    def matrices(self)", RUN_TOGETHER),
    ("experts", "check_decoding_equals_prefill", "    def matrices(self)", RUN_TOGETHER),
    ("experts", "check_few_rows", "    def matrices(self)", RUN_TOGETHER.replace("mean()", "amax()")),
    ("experts", "check_common_deviation", "    def matrices(self)", KEEP_SIZE),
    ("forms", "check_output_is_whole", "self.scale * passes", "self.scale / 0 * passes"),
    ("forms", "check_passes_decide", "self.scale * passes[0](x)", "self.scale * x + 0 * passes[0](x)"),
    ("forms", "check_number_of_passes", "    def forward(", NO_PASSES),
    ("forms", "check_few_tokens", "self.scale * passes", "x.amax() * self.scale * passes"),
    ("forms", "check_tokens_are_independent", "self.scale * passes", "x.mean() * self.scale * passes"),
    ("forms", "check_gradient_reaches_every_parameter", "self.scale *", "self.scale.detach() *"),
    (
        "forms",
        "check_gradient_matches_differences",
        "self.scale * passes[0](x)",
        "self.scale * (2 * passes[0](x) - passes[0](x).detach())",
    ),
    ("forms", "check_low_precision", "self.scale *", "self.scale.float() *"),
    ("forms", "check_state_dict_round_trip", "nn.Parameter(torch.ones(shape.d_model))", FORGETS),
    ("forms", "check_tags_are_known", '"tags": []', '"tags": ["odd"]'),
    ("forms", "check_rescale", "nn.Parameter(torch.ones(shape.d_model))", OWN_SIZE),
    ("attentions", "check_tags_are_known", '"gives_weights"', '"gives_weight"'),
    ("attentions", "check_output_is_whole", "gathered.flatten(2)), w", "gathered.flatten(2)) / 0, w"),
    ("attentions", "check_gives_weights", '"tags": ["gives_weights"]', '"tags": []'),
    (
        "attentions",
        "check_padding_changes_nothing",
        "self.o_proj(gathered",
        "inputs.x.mean() + self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_few_tokens",
        "self.o_proj(gathered",
        "inputs.x.std(1, keepdim=True) + self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_causal",
        "self.o_proj(gathered",
        "inputs.x.mean(1, True).mean() + self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_tokens_see_each_other",
        "self.o_proj(gathered",
        "inputs.x + 0 * self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_rows_are_independent",
        "self.o_proj(gathered",
        "inputs.x.mean(0) + self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_decoding_equals_prefill",
        "inputs.cos.unsqueeze(1)",
        "inputs.cos[:1, :1].unsqueeze(1)",
    ),
    (
        "attentions",
        "check_gradient_reaches_every_parameter",
        "gathered.flatten(2)",
        "gathered.detach().flatten(2)",
    ),
    (
        "attentions",
        "check_gradient_matches_differences",
        "self.o_proj(gathered",
        "inputs.x - inputs.x.detach() + self.o_proj(gathered",
    ),
    (
        "attentions",
        "check_low_precision",
        "self.o_proj(gathered.flatten(2)),",
        "self.o_proj(gathered.flatten(2)).float(),",
    ),
    ("attentions", "check_state_dict_round_trip", "self.seed, generator =", UNSAVED_SCALE),
    (
        "balancers",
        "check_results_are_finite",
        "mean_scores(routing))",
        "mean_scores(routing)) / routing.load.sum()",
    ),
    ("balancers", "check_imbalance_costs_more", "self.coefficient * routing", "-self.coefficient * routing"),
    ("balancers", "check_loss_lowers_imbalance", "self.coefficient * routing", "-self.coefficient * routing"),
    ("balancers", "check_tags_are_known", '["by_load"]', '["hot"]'),
    ("balancers", "check_by_load", '["by_load"]', "[]"),
    (
        "balancers",
        "check_sizes",
        "self.coefficient * routing",
        "self.coefficient / (24 - routing.num_experts) * routing",
    ),
    (
        "balancers",
        "check_extreme_logits",
        "self.coefficient * routing",
        "routing.scores.log().exp()[0, 0] * 0 + self.coefficient * routing",
    ),
    (
        "balancers",
        "check_autocast_changes_nothing",
        "load_shares(inputs) * mean_scores(routing)",
        "load_shares(inputs) @ mean_scores(routing)",
    ),
    (
        "balancers",
        "check_low_precision",
        "self.coefficient * routing",
        "self.coefficient * routing.scores.detach().numpy().size * routing",
    ),
    (
        "balancers",
        "check_expert_order_is_irrelevant",
        "mean_scores(routing))",
        "mean_scores(routing).cumsum(0))",
    ),
    ("balancers", "check_padding_does_not_count", "mean_scores(routing)", "routing.scores.mean(0)"),
    ("balancers", "check_even_load_costs_least", "self.coefficient * routing", "-self.coefficient * routing"),
    ("balancers", "check_collapse_is_seen", "self.coefficient * routing", "-self.coefficient * routing"),
    ("balancers", "check_parts_make_the_whole", "load_shares(inputs) *", "mean_scores(routing) *"),
    pytest.param(
        "balancers",
        "check_shards_make_the_whole",
        "load_shares(inputs) *",
        "mean_scores(routing) *",
        marks=pytest.mark.slow,
    ),
    ("mixers", "check_tags_are_known", '["token_', '["tkn_'),
    ("mixers", "check_output_is_whole", "(inputs.x)), routing", "(inputs.x)) + 1, routing"),
    ("mixers", "check_padding_changes_nothing", "logits.softmax(-1)", "(logits - logits.sum(0)).softmax(0)"),
    ("mixers", "check_few_tokens", "logits = e", "inputs.x.amax()\n        logits = e"),
    ("mixers", "check_reads_only_declared_fields", "logits = e", "logits = inputs.step + 1 * e"),
    ("mixers", "check_one_expert_is_that_expert", "made * routing.weights", "made * 2 * routing.weights"),
    ("mixers", "check_causal", "logits = e", "logits = (1 + inputs.x.mean()) * e"),
    ("mixers", "check_batch_invariant", "logits.softmax(-1)", "(logits - logits.mean(0)).softmax(-1)"),
    (
        "mixers",
        "check_gradient_reaches_every_parameter",
        "made * routing.weights",
        "made * routing.weights.detach()",
    ),
    (
        "mixers",
        "check_gradient_matches_differences",
        "made * routing",
        "(2 * made - made.detach()) * routing",
    ),
    ("mixers", "check_low_precision", "weighted.to(inputs.x)", "weighted.float()"),
    ("mixers", "check_state_dict_round_trip", "logits = e", "logits = id(self) // 16 % 99991 * e"),
    (
        "mixers",
        "check_sizes_and_padded_rows",
        "made * routing.weights",
        "made / (8 - inputs.x.shape[0] // 8) * routing.weights",
    ),
    ("mixers", "check_extreme_tokens", "logits = e", "logits = 1e35 * e"),
    (
        "mixers",
        "check_autocast_keeps_shares",
        "exact_logits(inputs.x, self.weight)",
        "inputs.x @ self.weight.T",
    ),
    ("mergers", "check_only_merges", "[ordered[num_groups - 1 :]]", "[ordered[num_groups - 1 :] + [0]]"),
    ("mergers", "check_every_layer_stores_the_budget", "num_groups - 1 :]]", "num_groups:]]"),
    ("mergers", "check_relabelling", "most_used(layer, experts)", "list(experts)"),
    ("mergers", "check_protected_experts_stay_alone", "trace, budget,", "trace, Budget(num_experts=4),"),
    ("pruners", "check_only_drops", "trace, budget,", "trace.__class__, budget,"),
    ("pruners", "check_relabelling", "layer.weight_sums.sum(0)", "layer.weight_sums.sum(0).cumsum(0)"),
    ("pruners", "check_unseen_experts_have_a_score", "weight_sums.sum(0)", "weight_sums.sum(0).log()"),
    ("pruners", "check_protected_experts_stay", "trace, budget,", "trace, Budget(num_experts=3),"),
    ("pruners", "check_only_counts_that_may_be", "trace, budget,", "trace, Budget(num_experts=7),"),
    ("quantizers", "check_shapes_and_dtypes", ".to(dtype)", ".float()"),
    ("quantizers", "check_loses_less_than_everything", '["scales"]).to', '["scales"]).neg().to'),
    ("quantizers", "check_predicted_bytes_are_written", "cols + 4", "cols + 2"),
    ("quantizers", "check_second_round_changes_little", '["scales"]).to', '["scales"] * 1.9).to'),
    ("quantizers", "check_zeros_stay_zero", '["scales"]).to', '["scales"] + 1).to'),
    ("quantizers", "check_scale_is_irrelevant", "/ 127\n", "/ 127 + 1e-6\n"),
    ("quantizers", "check_survives_storage", '{"rows": rows, "cols": cols}', '{"rows": rows}'),
    (
        "quantizers",
        "check_decode_repeats",
        "return (enc",
        'encoded.tensors["scales"].mul_(1.1)\n        return (enc',
    ),
    ("quantizers", "check_bad_numbers_are_refused", "torch.isfinite(weight).all()", "True"),
    ("caches", "check_contents_follow_the_touches", "return oldest", "return key"),
    ("model_routers", "check_estimates_are_sound", '["scores"][nearest]', '["scores"][nearest] * 2'),
    ("model_routers", "check_estimates_are_sound", '"title": "Mine"', '"title": "Mine", "tags": ["soft"]'),
    (
        "model_routers",
        "check_order_and_names_do_not_matter",
        '["scores"][nearest]',
        '["scores"][nearest] * (0.5 if "ant" in self.models else 1.0)',
    ),
    (
        "model_routers",
        "check_prompts_are_independent",
        "(batch.embeddings @",
        "((batch.embeddings - batch.embeddings.mean(0)) @",
    ),
    (
        "model_routers",
        "check_what_is_kept_is_enough",
        '["scores"][nearest]',
        '["scores"][nearest] * (id(self) // 16 % 9973 / 9973)',
    ),
    (
        "model_routers",
        "check_few_and_equal_outcomes",
        "nearest = (",
        'assert len(self.state["known"]) > 1\n        nearest = (',
    ),
    (
        "model_routers",
        "check_a_model_that_comes_later",
        '"title": "Mine"',
        '"title": "Mine", "tags": ["dynamic_pool"]',
    ),
    ("aggregators", "check_calls_are_bounded", "return num_models", "return num_models - 1"),
    ("aggregators", "check_cost_is_the_sum_of_calls", "for model in models", "for model in models[:0]"),
    ("aggregators", "check_all_failing_is_an_error", "for model in models", "for model in models[:0]"),
    ("aggregators", "check_equal_answers_are_the_answer", "(reply.text)", "(reply.text.upper())"),
    (
        "aggregators",
        "check_some_failing_is_survived",
        "if reply.ok:",
        "assert reply.ok\n            if reply.ok:",
    ),
    ("aggregators", "check_many_prompts_are_as_one", "(reply.text)", "(f'{reply.text} {id(self)}')"),
    ("aggregators", "check_only_plain_asks_replay", "plain=True", "plain=False"),
    ("caches", "check_what_is_held_stays", "if one not in held", ""),
    ("prefetchers", "check_guesses_are_experts_to_come", "Key(later, expert)", "Key(later, expert + 4)"),
    ("prefetchers", "check_guesses_something", "for expert in self._last", "for expert in {} and self._last"),
    (
        "prefetchers",
        "check_the_last_layer_is_no_trouble",
        "later = sight",
        "later = sight.num_experts[1] * sight",
    ),
    (
        "prefetchers",
        "check_unknown_gates_are_no_trouble",
        "later = sight",
        "sum(sight.gates(0))\n        later = sight",
    ),
    (
        "caches",
        "check_no_room_is_refused",
        "super().__init__(capacity)",
        "super().__init__(abs(capacity) + 1)",
    ),
    ("estimators", "check_tags_are_known", '"tabular"]', '"tabulr"]'),
    ("estimators", "check_predictions_are_whole", "num_outputs), routing", "num_outputs) / 0, routing"),
    ("estimators", "check_routing_is_whole", "told(x, ", "told(x / 0, "),
    ("estimators", "check_rows_are_independent", "experts, x, routing", "experts, x - x.mean(0), routing"),
    (
        "estimators",
        "check_what_is_saved_is_loaded",
        "nn.ModuleList(perceptron(d_in, owner.d_hidden, d_out)",
        "list(perceptron(d_in, owner.d_hidden, d_out).double()",
    ),
    (
        "estimators",
        "check_learning_again_forgets",
        "return _Network(d_in, d_out, self)",
        'return vars(self).setdefault("kept", _Network(d_in, d_out, self))',
    ),
    ("decoders", "check_neutral_settings_are_plain_decoding", "self.power * logits", "-self.power * logits"),
    (
        "decoders",
        "check_nothing_is_left_behind",
        "return (Branch(),)",
        "prompt.probe._model.register_forward_hook(lambda *_: None); return (Branch(),)",
    ),
    (
        "decoders",
        "check_prompts_do_not_touch_each_other",
        "self.power * logits[:, 0]",
        "self.power * (logits[:, 0] - 9 * logits[:1, 0])",
    ),
    ("decoders", "check_length_and_end", "return (Branch(),)", "return (Branch(forced=(1, 5)),)"),
    ("decoders", "check_seed_decides", "self.power * logits", '__import__("random").random() * logits'),
    (
        "decoders",
        "check_more_room_changes_nothing_before",
        "self.power * logits",
        "(candidates[0].prompt.max_new_tokens - 8) * logits",
    ),
    (
        "decoders",
        "check_dense_models",
        "return (Branch(),)",
        "from mixtura.errors import UnsupportedModelError; raise UnsupportedModelError('no')",
    ),
    ("decoders", "check_tags_are_known", '"title": "Mine"', '"title": "Mine", "tags": ["serches"]'),
    ("decoders", "check_neutral_settings_exist", '{"power": 1.0}', '{"pwer": 1.0}'),
    ("analyses", "check_one_row_per_layer", '"layer": layer.index', '"layer": 0'),
    ("analyses", "check_report_is_json", '"busiest": most', '"busiest": float("inf")'),
    ("analyses", "check_nothing_seen", " if total else None", ""),
    ("analyses", "check_tags_are_known", '"title": "Mine"', '"title": "Mine", "tags": ["needs:choces"]'),
    (
        "analyses",
        "check_what_is_missing_is_said",
        '"title": "Mine"',
        '"title": "Mine", "tags": ["needs:choices"]',
    ),
    ("analyses", "check_figures_can_be_drawn", "tuple(rows))", f"tuple(rows), tables=({RAGGED},))"),
    ("analyses", "check_expert_order_is_irrelevant", "layer.load.max()", "layer.load[0]"),
    ("upcyclers", "check_every_layer_is_made", "range(shape.num_experts)]", "range(3)]"),
    ("upcyclers", "check_neurons_are_there", "Build(layer, expert, 0)", "Build(layer, expert, 1)"),
    (
        "upcyclers",
        "check_initial_function_is_the_dense_one",
        "Build(layer, expert, 0)",
        "Build(layer, expert, 0, scale=1.01)",
    ),
    (
        "upcyclers",
        "check_missing_text_is_refused",
        '"tags": ["initial:dense"]',
        '"tags": ["reads:activations"]',
    ),
    (
        "upcyclers",
        "check_other_numbers_are_refused_in_words",
        "actions: list",
        "1 / (shape.num_experts - 5)\n        actions: list",
    ),
    (
        "upcyclers",
        "check_arrays_are_named_by_what_they_hold",
        '"normal", 0.02, shape.seed)',
        '"rows", rows="none")',
    ),
    ("upcyclers", "check_survives_json", "Build(layer, expert, 0)", "Build(layer, expert, 0, ((0, 1),))"),
    ("data_mixers", "check_shares_are_whole", "Stretch(weights,", "Stretch(2 * weights,"),
    ("data_mixers", "check_the_state_is_all_it_remembers", "+ fell)", "+ fell * (id(self) // 16 % 9973))"),
    ("data_mixers", "check_the_order_of_domains_does_not_matter", "softmax(0)", "cumsum(0).softmax(0)"),
    ("data_mixers", "check_what_helps_most_is_read_most", '"tags": []', '"tags": ["online"]'),
    ("data_mixers", "check_losses_only_where_told", '"tags": []', '"tags": ["schedule"]'),
    ("ensembles", "check_says_probabilities", "mixed.log()", "2 * mixed.log()"),
    ("ensembles", "check_later_tokens_change_nothing", "mixed.log()", "mixed.roll(5, 1).log()"),
    ("ensembles", "check_token_by_token_is_at_once", "said * shares", "said[:, :1] * shares"),
    ("ensembles", "check_rows_are_independent", "mixed.log()", "(mixed + mixed.flip(0)).div(2).log()"),
    ("ensembles", "check_equal_models_are_one", "/ text.num_models", "/ (2 * text.num_models)"),
    ("ensembles", "check_a_model_that_is_sure_is_heard", "mixed.log()", "(-mixed).log_softmax(-1)"),
    ("ensembles", "check_training_leaves_models_alone", '"tags": []', '"tags": ["trained"]'),
    ("allocators", "check_one_loss_for_every_way", "seen.errors.copy()", "seen.errors[:, :2].copy()"),
    ("allocators", "check_fewer_bits_lose_no_less", "seen.errors.copy()", "1 - seen.errors"),
    ("allocators", "check_places_do_not_matter", "seen.errors.copy()", "seen.errors.cumsum(0)"),
    (
        "allocators",
        "check_experts_that_were_never_chosen",
        "seen.errors.copy()",
        "seen.errors / seen.loads[:, None]",
    ),
    ("trimmers", "check_one_number_per_neuron", "squares.float()", "squares.float()[:4]"),
    ("trimmers", "check_places_do_not_matter", "squares.float()", "squares.float().cumsum(0)"),
    ("trimmers", "check_neurons_that_never_fire_go_first", "squares.float()", "down.float().square().sum(0)"),
    ("trimmers", "check_more_active_counts_no_less", "seen.squares.float()", "-seen.squares.float()"),
    (
        "sparsifiers",
        "check_a_mask_for_every_matrix",
        "name, mask in masks}",
        'name, mask in masks if name != "attention"}',
    ),
    ("sparsifiers", "check_ever_fewer_weights", "num_steps // 2", "num_steps"),
    ("sparsifiers", "check_ever_fewer_weights", "mask & (", "mask | ("),
    ("sparsifiers", "check_short_trainings_have_their_turn", "step == num_steps // 2", "step == 20"),
    ("sparsifiers", "check_the_largest_weights_stay", ".abs() >=", " >="),
    ("statistics", "check_one_number_per_assignment", ".mean(-1)", ".mean(-1)[:1]"),
    ("statistics", "check_assignments_are_independent", ".mean(-1)", ".mean(-1).cumsum(0)"),
    ("statistics", "check_low_precision", "outputs.float().abs()", "outputs.square().square()"),
    ("statistics", "check_fields_are_known", '"title": "Mine"', '"title": "Mine", "tags": ["reads:rooted"]'),
    ("exchanges", "check_hops_lead_there", '("all",)\n\n', '("all", "all")\n\n'),
    ("exchanges", "check_nothing_is_lost", "lambda outputs: outputs", "lambda outputs: outputs + 1"),
    ("exchanges", "check_nothing_is_lost", "Packed(rows,", "Packed(rows.double(),"),
    ("exchanges", "check_equal_rows_are_exact", "lambda outputs: outputs", "lambda outputs: rows"),
    ("exchanges", "check_gradients_flow", "Packed(rows,", "Packed(rows.detach(),"),
    ("exchanges", "check_nothing_to_send", "Packed(rows,", "Packed(rows[: 99 + 1 // len(rows)],"),
    ("placements", "check_every_expert_lies_somewhere", "range(layer.shape.num_experts)", "range(4)"),
    ("placements", "check_tags_hold", '"equal_counts"', '"equal_count"'),
    ("placements", "check_tags_hold", "((e % cluster.num_devices,)", "(tuple(range(cluster.num_devices))"),
    ("placements", "check_counts_are_equal", "e % cluster.num_devices", "e % 5 % cluster.num_devices"),
    (
        "placements",
        "check_nothing_seen",
        "for layer in trace.layers:",
        "for layer in trace.layers:\n            1 / int(layer.load.sum())",
    ),
    (
        "statistics",
        "check_one_factor_per_choice",
        '"title": "Mine"',
        '"title": "Mine", "tags": ["reads:routed"]',
    ),
]


@pytest.mark.parametrize(("kind", "check", "old", "new"), BROKEN)
def test_a_broken_promise_is_found(tmp_path: Path, kind: str, check: str, old: str, new: str) -> None:
    (path,) = new_method(kind, "mine", tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    (outcome,) = run(kind, str(path), only=[check])
    assert outcome.status == "fail"
    assert outcome.reason
    assert "\n" not in outcome.reason


# The same for checks of routers that only a tag calls for: the tag, and what breaks its promise.
BROKEN_TAGS = [
    (
        "check_missing_fields_are_named",
        "reads:token_ids",
        "logits = F",
        "inputs.token_ids + 1\n        logits = F",
    ),
    ("check_ties_go_to_the_lowest_index", "lowest_index", "(chosen, weights,", "(chosen + 1, weights,"),
    ("check_state_goes_to_the_next_layer", "stateful", "valid=inputs", "state=scores, valid=inputs"),
    ("check_decoding_equals_prefill", "reads:positions", "logits = F", "logits = (len(inputs.x) > 2) * F"),
    ("check_kept_weights_decide", "keeps_weights", "logits = F", "logits = (1 + self.seed) * F"),
    ("check_kept_weights_decide", "keeps_weights", "logits = F", "logits = -F"),
    (
        "check_decoding_equals_prefill",
        'looks_ahead", "causal_inference", "batch_dependent',
        "(chosen, weights,",
        "(chosen[: len(chosen) // 2 + 1].repeat(2, 1)[: len(chosen)], weights,",
    ),
    ("check_causal", 'looks_ahead", "causal_inference', "logits = F", "logits = inputs.x.mean() * F"),
]


@pytest.mark.parametrize(("check", "tag", "old", "new"), BROKEN_TAGS)
def test_a_broken_promise_of_a_tag_is_found(tmp_path: Path, check: str, tag: str, old: str, new: str) -> None:
    (path,) = new_method("router", "mine", tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace("token_independent", tag).replace(old, new))
    (outcome,) = run("router", str(path), only=[check])
    assert outcome.status == "fail"


def test_an_online_data_mixer_that_moves_without_cause_is_found(tmp_path: Path) -> None:
    (path,) = new_method("data_mixers", "mine", tmp_path)
    claims = path.read_text().replace('"tags": []', '"tags": ["online"]')
    found = []
    for text in (claims, claims.replace("+ fell)", "+ fell + losses)")):
        path.write_text(text)
        (outcome,) = run("data_mixers", str(path), only=["check_equal_losses_change_nothing"])
        found.append(outcome.status)
    assert found == ["pass", "fail"]


def test_every_kind_is_broken_here() -> None:
    broken = [getattr(case, "values", case) for case in BROKEN]
    assert {kind for kind, *_ in broken} == {kind.name for kind in kinds()}


def declare_gap(path: Path, check: str) -> None:
    path.write_text(path.read_text().replace('"Mine"', f'"Mine", "gaps": {{"{check}": "a reason"}}'))


def test_a_known_gap_is_no_failure(tmp_path: Path) -> None:
    (path,) = new_method("cache", "mine", tmp_path)
    text = path.read_text()
    assert "in self._arrivals if" in text
    # The last that came goes first: any cache may do that, but the example says otherwise.
    path.write_text(text.replace("in self._arrivals if", "in reversed(self._arrivals) if"))
    before = {outcome.check: outcome for outcome in run("cache", str(path)) if not outcome.ok}
    assert list(before) == ["check_doctest"]
    declare_gap(path, "check_doctest")
    after = {outcome.check: outcome for outcome in run("cache", str(path))}
    assert all(outcome.ok for outcome in after.values())
    assert (after["check_doctest"].status, after["check_doctest"].reason) == ("gap", "a reason")


def test_a_gap_that_is_none_any_more_fails(tmp_path: Path) -> None:
    (path,) = new_method("cache", "mine", tmp_path)
    declare_gap(path, "check_doctest")
    bad = [outcome for outcome in run("cache", str(path)) if not outcome.ok]
    assert [(outcome.check, outcome.status) for outcome in bad] == [("check_doctest", "stale gap")]


def test_a_gap_of_no_check_fails(tmp_path: Path) -> None:
    (path,) = new_method("cache", "mine", tmp_path)
    declare_gap(path, "check_nothing")
    bad = [outcome for outcome in run("cache", str(path)) if not outcome.ok]
    assert [outcome.check for outcome in bad] == ["check_header"]
    assert "'check_nothing'" in bad[0].reason


UPDATE = """    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        return {"bias": torch.zeros(shape.num_experts, dtype=torch.float32)}

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        bias, counts = inputs.state["bias"], inputs.demand.float()
        return {"bias": bias + self.coefficient * (counts.mean() - counts).sign()}
"""


def balancer_by_bias(folder: Path, update: str) -> str:
    """A balancer that moves a bias instead of adding a loss."""
    (path,) = new_method("balancer", "mine", folder)
    text = path.read_text()
    text = text[: text.index("    def loss(")] + update
    text = text.replace(
        "from typing import final\n", "from collections.abc import Mapping\nfrom typing import final\n"
    )
    text = text.replace("import BalancerInput", "import BalancerInput, LayerShape")
    text = text.replace("from jaxtyping import Float\n", "import torch\n")
    start, end = text.index("        >>> from"), text.index('    """\n\n    def __init__')
    example = "        >>> Mine(coefficient=0.5).coefficient\n        0.5\n\n"
    path.write_text(text[:start] + example + text[end:])
    return str(path)


def test_a_balancer_may_move_a_bias(tmp_path: Path) -> None:
    path = balancer_by_bias(tmp_path, UPDATE)
    assert [outcome for outcome in run("balancer", path, quick=True) if not outcome.ok] == []


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("check_update_lowers_imbalance", "counts.mean() - counts", "counts - counts.mean()"),
        ("check_expert_order_is_irrelevant", ".sign()", ".sign().cumsum(0)"),
        ("check_inputs_are_unchanged", "float()", "float()\n        inputs.routing.valid.logical_not_()"),
        ("check_collapse_is_seen", "counts.mean() - counts", "counts - counts.mean()"),
        ("check_bias_evens_the_load", "counts.mean() - counts", "counts - counts.mean()"),
        ("check_state_keeps_its_form", '{"bias": bias', '{"other": bias'),
        ("check_parts_make_the_whole", "inputs.demand", "inputs.routing.load"),
        ("check_state_is_exact", ", dtype=torch.float32", ""),
        ("check_sizes", "shape.num_experts", "8"),
        ("check_results_are_finite", "self.coefficient *", "self.coefficient / 0 * counts[0] +"),
    ],
)
def test_a_broken_bias_is_found(tmp_path: Path, check: str, old: str, new: str) -> None:
    assert old in UPDATE
    path = balancer_by_bias(tmp_path, UPDATE.replace(old, new))
    (outcome,) = run("balancer", path, only=[check])
    assert outcome.status == "fail"


def test_a_balancer_that_does_nothing_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Mine must define loss or update"):
        run("balancer", balancer_by_bias(tmp_path, "    pass\n"))


@pytest.mark.parametrize(
    ("check", "made"),
    [
        ("check_one_factor_per_choice", "tokens.weights[:, :1]"),
        ("check_one_factor_per_choice", "tokens.weights / 0"),
        ("check_one_factor_per_choice", "tokens.weights.mul_(2)"),
        ("check_factors_are_independent", "tokens.weights.cumsum(0)"),
        ("check_factors_are_independent", "tokens.chosen.float()[:, -1:] + tokens.weights"),
    ],
)
def test_a_broken_factor_is_found(tmp_path: Path, check: str, made: str) -> None:
    (path,) = new_method("statistics", "mine", tmp_path)
    tagged = path.read_text().replace('"title": "Mine"', '"title": "Mine", "tags": ["reads:weights"]')
    for factor, status in (("tokens.weights", "pass"), (made, "fail")):
        own = f"    def factor(self, tokens):\n        return {factor}\n\n    def measure("
        path.write_text(tagged.replace("    def measure(", own))
        (outcome,) = run("statistics", str(path), only=[check])
        assert outcome.status == status, outcome.reason
