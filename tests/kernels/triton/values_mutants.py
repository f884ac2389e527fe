"""Faults planted in the kernels' handling of illegal ids, positions, slots, lengths, pages and bounds."""

from __future__ import annotations

from tests.kernels.triton.planted import mutant

WRONG_LENGTH = "test_a_length_that_the_table_has_no_room_for_gives_nan"
WRONG_PAGE = "test_a_page_that_does_not_exist_gives_nan_to_the_queries_that_see_it"
NO_PAGES = "test_a_pool_without_pages_has_no_keys"
WRONG_BOUNDS = "test_bounds_that_do_not_ascend_within_the_rows_give_nan"
WRONG_POSITION = "test_a_position_outside_of_the_cache_turns_by_nan"
WRONG_SLOT = "test_wrong_positions_and_slots_reach_no_other_token"
MANY_BOUNDS = "test_more_bounds_than_are_read_at_once"
VALUES_MUTANTS = [
    mutant(name, file, old, new, f"ops/test_values.py::{test}")
    for name, file, old, new, test in (
        ("a page past the pool", "attention/flash", "(pages >= 0) & (pages < num_pages)", "pages >= 0", WRONG_PAGE),
        (
            "a page before the pool",
            "attention/flash",
            "(pages >= 0) & (pages < num_pages)",
            "pages < num_pages",
            WRONG_PAGE,
        ),
        (
            "numbers of the first page",
            "attention/flash",
            'tl.where(exists, scale_log2, float("nan"))',
            "scale_log2",
            WRONG_PAGE,
        ),
        (
            "values of the first page",
            "attention/flash",
            "((tokens < k_len) & exists)[:, None]",
            "(tokens < k_len)[:, None]",
            WRONG_PAGE,
        ),
        (
            "scales of the first page",
            "attention/flash",
            "v_slots, (tokens < k_len) & exists,",
            "v_slots, tokens < k_len,",
            WRONG_PAGE,
        ),
        (
            "a length without room",
            "attention/flash",
            "(length >= 0) & (length <= longest)",
            "length >= 0",
            WRONG_LENGTH,
        ),
        (
            "a negative length is none",
            "attention/flash",
            "(length >= 0) & (length <= longest)",
            "length <= longest",
            WRONG_LENGTH,
        ),
        (
            "zeros of a wrong length",
            "attention/decode",
            'tl.where(is_legal, total, float("nan"))',
            "total",
            WRONG_LENGTH,
        ),
        (
            "zeros of a wrong length in prefill",
            "attention/prefill",
            "tl.where(is_legal, total, float",
            "tl.where(True, total, float",
            WRONG_LENGTH,
        ),
        (
            "a length without room in prefill",
            "attention/prefill",
            "(k_len >= 0) & (k_len <= longest)",
            "k_len >= 0",
            WRONG_LENGTH,
        ),
        (
            "bounds past the rows",
            "attention/prefill",
            "(bounds < least) | (bounds > num_rows)",
            "(bounds < least)",
            WRONG_BOUNDS,
        ),
        (
            "bounds that descend",
            "attention/prefill",
            "(bounds < least) | (bounds > num_rows)",
            "(bounds > num_rows)",
            WRONG_BOUNDS,
        ),
        ("bounds from anywhere", "attention/prefill", " | ((seq == 0) & (bounds != 0))", "", WRONG_BOUNDS),
        ("keys' bounds not looked at", "attention/prefill", "        if K_BOUNDS:", "        if False:", WRONG_BOUNDS),
        (
            "the first bounds alone",
            "attention/prefill",
            "range(0, num_seqs + 1, LANES)",
            "range(0, LANES, LANES)",
            MANY_BOUNDS,
        ),
        (
            "a pool without pages",
            "attention/decode",
            "longest, unit = room(k_pages, page_table), ",
            "longest, unit = 1 << 30, ",
            NO_PAGES,
        ),
        (
            "a position past the cache",
            "rows/rope",
            "(position >= 0) & (position < num_positions)",
            "position >= 0",
            WRONG_POSITION,
        ),
        ("a position before it", "rows/rope", "(position >= 0) & (position", "(position", WRONG_POSITION),
        ("angles of no position", "rows/heads", 'tl.where(exists, 1.0, float("nan"))', "1.0", WRONG_POSITION),
        ("a slot past the pages", "rows/rope", "(slot >= 0) & (slot < num_slots)", "slot >= 0", WRONG_SLOT),
    )
]
