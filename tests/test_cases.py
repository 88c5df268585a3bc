"""Each kind of input that tools get wrong has at least three variations in these tests: which tests try them, counted."""

from collections import Counter

import pytest

FEWEST = 3
CASES: dict[str, list[tuple[str, str]]] = {  # a kind: the tests of its variations, and what their ids hold
    "files of equal names": [("test_inputs.py::test_files_of_equal_names_get_datasets_of_their_own", "")],
    "a last turn that ends in its own way": [
        ("test_endings.py::test_ids_are_those_of_transformers_and_ends_are_trained", name)
        for name in ("phi3", "eos_at_the_very_end", "another_end_for_the_last", "channels")
    ],
    "no end of an answer": [
        ("test_endings.py::test_a_template_that_ends_no_answer_is_refused", ""),
        ("test_endings.py::test_a_token_can_be_added_after_each_answer", ""),
    ],
    "an eos token that ends no answer": [
        ("test_endings.py::test_what_the_template_writes_after_an_answer_ends_it", name)
        for name in ("qwen_base", "llama3", "ends_with_text", "only_a_newline")
    ],
    "reasoning that is not written": [("test_lost.py::test_what_a_template_leaves_out_is_found", "reasoning")],
    "tools that are not called": [
        ("test_lost.py::test_what_a_template_leaves_out_is_found", name)
        for name in ("[tools]", "a tool's description", "the second tool", "a parameter")
    ],
    "names and ids of tools": [
        ("test_lost.py::test_what_a_template_leaves_out_is_found", name) for name in ("ids in", "name", "the second call")
    ],
    "arguments as text": [
        ("test_rows.py::test_arguments_are_the_same_as_text_and_as_an_object", ""),
        ("test_odd_rows.py::test_an_odd_row_is_read_ignored_in_part_or_left_out", "arguments"),
    ],
    "messages of weight 0": [
        ("test_schemas.py::test_the_weight_of_a_message_is_kept_or_refused", ""),
        ("test_lost.py::test_messages_of_weight_0_are_not_trained", ""),
    ],
    "a history": [
        ("test_schemas.py::test_a_row_of_a_published_schema_is_read_as_what_it_is", "with history"),
        ("test_odd_rows.py::test_an_odd_row_is_read_ignored_in_part_or_left_out", "history"),
    ],
    "keys that no schema knows": [("test_schemas.py::test_what_a_row_says_and_no_field_reads_is_counted", "")],
    "characters that a tokenizer does not know": [("test_lost.py::test_unknown_characters_are_counted_in_bytes", "")],
    "a configuration without its defaults": [("test_released.py::test_missing_keys_take_transformers_defaults", "")],
    "a JSON array": [
        ("test_formats.py::test_every_format_gives_the_same_rows_whole_and_in_parts", ".json]"),
        ("test_formats.py::test_bad_elements_of_an_array_are_rows_that_do_not_shift_the_others", ""),
        ("test_odd_files.py", "array"),
    ],
    "tables": [
        ("test_formats.py::test_every_format_gives_the_same_rows_whole_and_in_parts", part)
        for part in (".parquet", ".arrow", ".feather", "csv", "tsv")
    ],
    "compressed files": [
        ("test_formats.py::test_every_format_gives_the_same_rows_whole_and_in_parts", part)
        for part in (".gz", ".zst", ".xz", ".bz2", ".zip")
    ],
    "other encodings": [("test_formats.py::test_another_encoding_is_named_with_the_command_that_converts_it", "")],
    **{
        f"{schema} rows": [("test_schemas.py::test_a_row_of_a_published_schema_is_read_as_what_it_is", schema)]
        for schema in ("prompt and completion", "chosen and rejected", "transcripts", "Alpaca", "null is absent")
    },
    "Git LFS pointers": [("test_convert.py::test_git_lfs_pointers_are_named_with_the_command_that_fetches_the_file", "")],
    "a template that asks for the date": [
        ("test_endings.py::test_what_is_no_date_is_refused", ""),
        ("test_endings.py::test_the_date_is_recorded_and_stands_in_the_datasets_template", ""),
    ],
    "named templates": [
        ("test_endings.py::test_conversations_with_tools_take_the_template_of_that_name", ""),
        ("test_endings.py::test_a_dataset_holds_all_templates", ""),
    ],
    "a mistyped run": [("test_first_hour.py::test_a_mistyped_run_is_refused", "")],
    "a run that is lengthened": [
        ("test_presets.py::test_a_run_whose_schedule_does_not_depend_on_its_length_may_be_lengthened", "")
    ],
    "characters that a terminal lacks": [("test_terminal.py::test_characters_that_the_terminal_lacks_are_replaced", "")],
    "arguments that are no text": [("test_terminal.py::test_an_argument_that_is_not_utf_8_is_one_line", "")],
    "a full disk": [("test_export.py::test_a_full_disk_leaves_nothing_and_the_next_try_works", "")],
    "logprobs of parts of characters": [
        ("test_serve.py::test_tokens_that_are_parts_of_a_character_give_their_bytes", ""),
        ("test_serve.py::test_completions_give_as_many_top_logprobs_as_asked_for", ""),
    ],
    "labels of unwanted answers": [
        ("test_odd_rows.py::test_an_odd_row_is_read_ignored_in_part_or_left_out", part) for part in ("label", "kto")
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_three_variations(case: str, request: pytest.FixtureRequest) -> None:
    ids = [item.nodeid.removeprefix("tests/") for item in request.session.items]
    files = Counter(id.partition("::")[0] for id in ids)
    if not all(files[test.partition("::")[0]] > 1 for test, _ in CASES[case]):
        pytest.skip("only the whole suite has all tests")
    found = {id for id in ids for test, part in CASES[case] if id.startswith(test) and part in id[len(test) :]}
    print(f"{len(found):4} {case}")
    assert len(found) >= FEWEST
