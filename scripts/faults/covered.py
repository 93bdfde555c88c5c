"""Cases that committed tests cover, which are run once and counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from scripts.common import ROOT, outcomes_of
from scripts.faults.lab import Failed, Lab, check

ROWS = "test_dataset.py::TestAdapt::"
ENCODE = "test_encode.py::"
COVERED = {
    "5": ("test_lora_stages.py::test_resumed_equals_uninterrupted",),
    "26": (
        "test_ranks.py::test_every_example_is_trained_on_once",
        "test_ranks.py::test_a_checkpoint_of_two_goes_on_with_four",
        "test_ranks.py::test_a_checkpoint_of_two_goes_on_with_one",
    ),
    "30": (
        "test_memory.py::test_a_step_is_the_same_in_smaller_micro_batches",
        "test_memory.py::test_the_first_step_is_exact",
        "test_elastic.py::test_ranks_out_of_memory_go_on_with_smaller_rows",
    ),
    "31": (
        "test_training.py::test_micro_batches_do_not_change_the_step",
        "test_training.py::test_dpo_starts_at_ln_2_and_learns",
        "test_attention.py::test_loss_and_every_gradient_equal_the_plain_forward",
        "test_attention.py::test_the_slow_ways_are_exact_as_well",
        "test_reward_model.py::test_rewards_and_every_gradient_equal_the_padded_forward",
    ),
    "32": (
        f"{ENCODE}test_every_row_is_encoded_or_counted",
        "test_adapters.py::test_any_row_is_read_or_refused",
    ),
    "33": (f"{ROWS}test_bad_rows_are_counted_by_reason", f"{ROWS}test_none_left"),
    "34": (
        f"{ROWS}test_bad_rows_are_counted_by_reason",
        f"{ROWS}test_column_missing_from_the_first_row_names_the_key",
        "test_adapters.py::TestJsonl::test_bad",
    ),
    "35": (
        f"{ROWS}test_bad_rows_are_counted_by_reason",
        f"{ENCODE}TestLimits::test_equal_once_cut",
    ),
    "36": (
        f"{ENCODE}TestLimits::test_prompt_is_cut_first",
        f"{ENCODE}TestLimits::test_no_tokens",
        f"{ENCODE}test_nothing_left",
    ),
    "37": (
        f"{ENCODE}TestLimits::test_then_the_responses_without_eos",
        f"{ENCODE}TestLimits::test_short_prompt_leaves_more_room",
        f"{ENCODE}TestLimits::test_cut_end_of_turn_is_cut_whole",
    ),
    "38": (
        f"{ENCODE}TestSpecialTokensInText::test_user_text_stays_text",
        f"{ENCODE}TestSpecialTokensInText::test_chat_message_cannot_end_its_turn",
        f"{ENCODE}TestEdges::test_one_bos_where_the_tokenizer_writes_one",
        f"{ENCODE}TestChat::test_prompt_and_end_are_the_templates",
        f"{ENCODE}TestChat::test_bos_is_added_to_a_template_without_one",
        f"{ENCODE}test_every_row_is_encoded_or_counted",
        f"{ENCODE}test_huge_row",
    ),
    "39": (
        "test_cli.py::test_a_mistake_is_one_line_and_leaves_nothing",
        "test_cli.py::test_a_mistake_is_told_within_two_seconds",
        "test_compose.py::test_an_unknown_key_is_told_with_what_was_meant",
        "test_sweep.py::test_a_failing_job_does_not_stop_the_others",
        "test_sweep.py::test_a_mistake_in_a_swept_key_starts_no_job",
    ),
    "40": (
        "test_sources.py::test_pickles_are_never_read",
        "test_load.py::test_pickled_weights_are_refused",
        "test_compose.py::test_no_target_is_accepted",
        "test_compose.py::test_a_target_deep_in_lists_is_found",
        "test_run_folder.py::test_names_cannot_leave_the_runs_folder",
        "test_run_folder.py::test_values_of_the_environment_are_not_stored",
        "test_page.py::test_hostile_text_is_only_text",
        "test_page.py::test_secrets_and_the_home_folder_stay_out",
        "test_report_files.py::test_run_files_describe_the_run_without_secrets",
        "test_judge_http.py::test_hostile_texts_are_only_texts",
        "test_judge_http.py::test_the_time_out_is_of_the_whole_request",
        "test_judge_http.py::test_the_key_is_nowhere",
        "test_judge.py::test_what_an_answer_decides",
    ),
    "B10": ("test_recipe.py::test_two_of_one_recipe_do_not_meet",),
    "B16": (
        "test_fuzz_folders.py::test_a_models_files",
        "test_fuzz_folders.py::test_an_adapters_settings",
        "test_fuzz_folders.py::test_an_index",
        "test_fuzz_folders.py::test_a_recipe",
    ),
    "B15": (
        "test_secrets.py::test_what_a_run_was_composed_of",
        "test_secrets.py::test_the_folder_of_a_run",
        "test_secrets.py::test_the_folder_of_a_sweep",
        "test_secrets.py::test_a_job_that_goes_on_is_given_its_secret_again",
        "test_secrets.py::test_the_folder_of_a_recipe",
        "test_secrets.py::test_rows_and_other_files_that_stages_write",
    ),
    "B5": (
        "test_recipe_sweep.py::test_a_killed_sweep_goes_on",
        "test_recipe_sweep.py::test_only_the_jobs_that_failed_run_again",
        "test_recipe_sweep.py::test_a_job_whose_outputs_were_touched_is_not_done",
        "test_recipe_sweep.py::test_a_sweep_with_other_words_starts_anew",
    ),
    "B7": (
        "test_label.py::test_torn_and_unfinished_samples_are_refused",
        "test_label.py::test_pairs_that_were_torn_are_not_trained_on",
    ),
    "B8": (
        "test_ppo.py::test_resumed_equals_uninterrupted_at_a_rollout",
        "test_ppo.py::test_a_signal_waits_for_the_rollouts_end",
    ),
    "B9": ("test_checkpoint.py::test_another_layout_is_refused_with_the_ways_on",),
    "B25": (
        "test_row_limits.py::test_a_line_that_is_too_long",
        "test_row_limits.py::test_a_compressed_file_is_read_no_further_than_its_limits",
        "test_row_limits.py::test_cells_and_columns",
        "test_row_limits.py::test_a_cut_text_has_the_tokens_of_the_whole_one",
    ),
    "B26": (
        "test_shared_caches.py::test_entries_have_the_permissions_of_the_cache",
        "test_shared_caches.py::test_a_damaged_entry_is_none",
        "test_shared_caches.py::test_a_file_that_is_written_while_it_is_read_is_not_cached",
    ),
    "B27": ("test_recipe_file.py::test_a_mistake_in_the_file",),
    "B28": (
        "test_win_rate.py::test_without_any_verdict_there_is_no_figure",
        "test_win_rate.py::test_a_policy_that_overflows_gives_no_figure",
        "test_lexicon.py::test_valences_that_overflow_are_no_score",
        "test_normalisation.py::test_facts_that_cannot_scale_a_reward",
        "test_row_limits.py::test_keys_that_stand_twice",
        "test_row_limits.py::test_cells_and_columns",
    ),
}


def by_tests(number: str) -> Callable[[Lab], str]:
    """The row of a case of COVERED."""

    def run(lab: Lab) -> str:
        tests = COVERED[number]
        outcomes = {
            name: outcome
            for name, outcome in results(lab).items()
            if name.partition("[")[0] in tests
        }
        ran = {name.partition("[")[0] for name in outcomes}
        check(ran == set(tests), f"did not run: {', '.join(set(tests) - ran)}")
        wrong = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "passed"]
        check(not wrong, f"{len(wrong)} of {len(outcomes)} tests: {'; '.join(wrong[:3])}")
        names = ", ".join(test.rpartition("::")[2] for test in tests)
        return f"{len(outcomes)} tests passed: {names}"

    return run


def results(lab: Lab) -> dict[str, str]:
    """Outcome of each test of all selected cases, by `file::Class::name[parameters]`."""
    if not lab.outcomes:
        tests = dict.fromkeys(test for number, tests in COVERED.items()
                               if number in lab.selected for test in tests)  # fmt: skip
        report = lab.folder / "tests.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
                   "-m", "slow or not slow",
                   f"--junitxml={report}", *(f"tests/{test}" for test in tests)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.is_file() or done.returncode not in (0, 1):
            raise Failed(f"pytest ended with {done.returncode}: {done.stdout.strip()[-300:]}")
        lab.outcomes = {name: status if status == "passed" else f"{status}: {why[:120]}"
                        for name, (status, why) in outcomes_of(report).items()}  # fmt: skip
    return lab.outcomes
