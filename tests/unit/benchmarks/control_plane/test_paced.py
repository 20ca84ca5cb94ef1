from benchmarks.control_plane.paced import FIRST_WORD, NUM_WORDS, PacedRunner
from shared.blocks import token_ids
from shared.engine.engine import PagedEngine
from shared.engine.fake import fake_model
from shared.engine.port import EngineLimits, EngineRequest
from shared.request import FinishReason, SamplingParams


def test_paced_steps_make_ordinary_words_and_answers_of_exact_length():
    model = fake_model(vocab_size=FIRST_WORD + NUM_WORDS)
    engine = PagedEngine(PacedRunner(model.layout, 8, 0.0), model, EngineLimits(1024, 8, 4, 64))
    for key in ("a", "b"):
        sampling = SamplingParams(max_tokens=3, min_tokens=3, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest(key, token_ids(range(100, 150)), 50, sampling))
    tokens = []
    while engine.has_work():
        tokens += engine.step().tokens
    assert [token.finish for token in tokens if token.index == 2] == [FinishReason.LENGTH] * 2
    assert len(tokens) == 6
    assert all(FIRST_WORD <= token.token_id < FIRST_WORD + NUM_WORDS for token in tokens)
    engine.check()
