"""The records of seats: what they hold, and that nothing is sent which the device knows."""

import numpy as np
import pytest
import torch

from shared.blocks import token_ids
from shared.engine.batch import BatchRow
from shared.engine.sampling.torch_sampler import choice_key
from shared.engine.seats import FIRST_END, FIRST_PAGE, Seats, Word
from shared.request import SamplingParams

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def row(start, end, *, seat=0, sequence=7, pages=(4,), ids=range(100, 140), sampling=GREEDY, sample=True):
    return BatchRow(
        key="k",
        sequence=sequence,
        seat=seat,
        ids=token_ids(ids),
        start=start,
        end=end,
        pages=pages,
        prompt_len=5,
        sample=sample,
        sampling=sampling,
        choice=3,
        forbid_end=False,
    )


@pytest.fixture
def seats():
    return Seats(num_seats=4, max_pages=8, eos_token_ids=(2, 9), vocab_size=300, device=torch.device("cpu"))


def drawn(seats, row, token):
    """What the draw leaves in the seat."""
    seats.words[row.seat, Word.POSITION] = row.end
    seats.words[row.seat, Word.TOKEN] = token


def test_a_record_holds_all_that_the_device_needs(seats):
    sampling = SamplingParams(
        max_tokens=9,
        seed=11,
        min_tokens=3,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        stop_token_ids=(40, 9, 1000),
        logprobs=4,
    )
    entered = row(6, 7, seat=2, pages=(5, 3), sampling=sampling)
    assert seats.prepare([entered]) == [entered]
    words = seats.words[2].numpy()
    floats = words.view(np.float32)
    assert [words[Word.POSITION], words[Word.TOKEN], words[Word.PROMPT_LEN], words[Word.MIN_TOKENS]] == [6, 106, 5, 3]
    assert floats[[Word.TEMPERATURE, Word.TOP_P, Word.MIN_P]] == pytest.approx([0.7, 0.9, 0.1])
    penalties = [Word.REPETITION_PENALTY, Word.PRESENCE_PENALTY, Word.FREQUENCY_PENALTY]
    assert floats[penalties].tolist() == [1.5, -0.5, 0.25]
    assert (words[Word.TOP_K], words[Word.NUM_LOGPROBS], words[Word.NUM_ENDS]) == (5, 4, 3)
    assert words[FIRST_END : FIRST_END + 3].tolist() == [2, 9, 40]
    key = words.view(np.uint32)[[Word.KEY_LOW, Word.KEY_HIGH]].tolist()
    assert key[0] + (key[1] << 32) == choice_key(11, 3)
    assert words[FIRST_PAGE : FIRST_PAGE + 3].tolist() == [5, 3, 0]
    assert (seats.words[[0, 1, 3, 4], Word.POSITION] == -1).all()


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-40])
def test_a_top_p_too_small_for_float32_still_keeps_a_token(seats, top_p):
    """With 0 the draw would never end."""
    seats.prepare([row(6, 7, sampling=SamplingParams(max_tokens=9, top_p=top_p))])
    assert seats.words[0].numpy().view(np.float32)[Word.TOP_P] == np.finfo(np.float32).tiny


def test_a_steady_decode_sends_nothing(seats):
    first = row(0, 20)
    seats.prepare([first])
    for position in range(20, 40):
        drawn(seats, first, 50)
        first = row(position, position + 1, pages=first.pages)
        assert seats.prepare([first]) == []
    assert seats.num_uploads == 1


def test_a_decode_row_is_prepared_before_its_token_is_known(seats):
    seats.prepare([row(0, 40)])
    seats.prepare([row(40, 41)])  # 40 ids: the token at 40 is in the seat alone
    assert seats.num_uploads == 1


@pytest.mark.parametrize(("old", "new"), [((4,), (4, 6)), ((4, 6), (4, 7, 1)), ((4, 6, 1), (5,))])
def test_new_pages_are_written_behind_those_that_stay(seats, old, new):
    seats.prepare([row(0, 20, pages=old)])
    drawn(seats, row(0, 20), 50)
    assert seats.prepare([row(20, 21, pages=new)]) == []
    assert seats.page_table[0, : len(new)].tolist() == list(new)
    assert seats.words[0, [Word.POSITION, Word.TOKEN]].tolist() == [20, 50]
    assert seats.num_uploads == 2


def test_a_last_chunk_of_one_token_brings_position_and_token(seats):
    seats.prepare([row(0, 30, sample=False)])
    seats.prepare([row(30, 31)])
    assert seats.words[0, [Word.POSITION, Word.TOKEN]].tolist() == [30, 130]


def test_chunks_send_no_position(seats):
    chunk = row(0, 8, sample=False)
    for start in (0, 8, 16):
        seats.prepare([row(start, start + 8, pages=chunk.pages, sample=start == 16)])
    assert seats.num_uploads == 1
    drawn(seats, row(16, 24), 50)
    seats.prepare([row(24, 25, pages=chunk.pages)])
    assert seats.words[0, [Word.POSITION, Word.TOKEN]].tolist() == [24, 50]


def test_another_sequence_replaces_the_whole_record(seats):
    seats.prepare([row(0, 20, pages=(4, 6, 7), sampling=SamplingParams(max_tokens=9, min_tokens=2))])
    entered = row(3, 4, sequence=8, pages=(1,))
    assert seats.prepare([entered]) == [entered]
    words = seats.words[0].tolist()
    assert (words[Word.POSITION], words[Word.TOKEN], words[Word.NUM_ENDS], words[FIRST_PAGE]) == (3, 103, 0, 1)
    assert words[Word.TEMPERATURE] == 0


def test_many_seats_at_once(seats):
    rows = [row(0, 5 + seat, seat=seat, sequence=seat, pages=tuple(range(seat, seat + 3))) for seat in range(4)]
    assert seats.prepare(rows) == rows
    assert seats.num_uploads == 1
    assert seats.page_table[:4, :3].tolist() == [[seat, seat + 1, seat + 2] for seat in range(4)]
    assert seats.words[seats.nobody, Word.POSITION] == -1
