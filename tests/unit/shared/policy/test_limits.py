from shared.policy.limits import Budget, Verdict, estimated_tokens


def test_a_cost_is_guessed_from_the_body_and_the_longest_answer():
    assert estimated_tokens(401, 50, 2) == 101 + 100
    assert estimated_tokens(0, None, 1) == 256


def test_a_client_is_told_where_it_stands():
    verdict = Verdict("tokens", 1.0, {"tokens": Budget(100, 7, 0.25)})
    assert verdict.headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "250ms",
    }
