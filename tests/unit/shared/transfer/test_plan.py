import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.transfer.plan import Message, plan_messages


@given(st.integers(0, 3000), st.integers(1, 10_000), st.integers(1, 100_000))
def test_each_page_travels_once_in_order_in_as_few_messages_as_fit(num_pages, page_bytes, message_bytes):
    if page_bytes > message_bytes:
        with pytest.raises(ValueError):
            plan_messages(num_pages, page_bytes, message_bytes)
        return
    plan = plan_messages(num_pages, page_bytes, message_bytes)
    assert [page for message in plan for page in range(message.start, message.end)] == list(range(num_pages))
    sizes = [message.num_pages for message in plan]
    assert all(size >= 1 and size * page_bytes <= message_bytes for size in sizes)
    assert len(plan) == -(-num_pages // (message_bytes // page_bytes))
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_pages_are_shared_out_evenly():
    assert plan_messages(7, 10, 35) == (Message(0, 2), Message(2, 4), Message(4, 7))
