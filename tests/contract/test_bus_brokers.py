"""Producers and readers while brokers are killed, stopped and woken: of one, and of three that keep each record."""

import asyncio
import signal
import time
from contextlib import asynccontextmanager

import pytest
from aiokafka import TopicPartition

from infra.kafka.create_topics import create_topics
from infra.local.kafka import kafka_cluster
from infra.local.process import Child
from shared.bus.kafka import KafkaBus
from shared.bus.kafka_client import leader_of
from shared.wire.topics import Topic
from tests.contract.bus_worlds import NUM_PARTITIONS, first_copies

TOPIC = "records"
SEND_INTERVAL_S = 0.01
AGAIN_WITHIN_S = 60.0


class Traffic:
    """One producer that sends without end to all partitions, and one reader of them."""

    def __init__(self, bus):
        self.bus = bus
        self.sent = []
        self.read = []
        self.acknowledged = set()
        self.waiting = set()

    @asynccontextmanager
    async def running(self):
        partitions = range(NUM_PARTITIONS)
        async with self.bus.producer() as self.producer, self.bus.reader(TOPIC, group="g") as self.reader:
            await self.reader.assign(dict.fromkeys(partitions, 0))
            tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._read())]
            try:
                yield
                tasks[0].cancel()
                async with asyncio.timeout(AGAIN_WITHIN_S):
                    await asyncio.gather(*self.waiting)
                    while len({record.value for record in self.read}) < len(self.sent):
                        await asyncio.sleep(0.02)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for partition in partitions:
            sent = [value for value in self.sent if value.startswith(b"%d " % partition)]
            read = [record for record in self.read if record.partition == partition]
            assert first_copies(read) == sent
            assert [record.offset for record in read] == list(range(len(read)))
        assert self.acknowledged == set(self.sent)

    async def again(self, partition):
        """Seconds until a record that is sent from now on to the partition was read."""
        began_s, first = time.monotonic(), len(self.sent)
        async with asyncio.timeout(AGAIN_WITHIN_S):
            while True:
                await asyncio.sleep(0.01)
                new = {value for value in self.sent[first:] if value.startswith(b"%d " % partition)}
                if any(record.value in new for record in self.read[-200:]):
                    return time.monotonic() - began_s

    async def leader(self, partition):
        return await leader_of(self.reader._client, TopicPartition(TOPIC, partition))

    async def _send(self):
        number = 0
        while True:
            value = b"%d %d" % (number % NUM_PARTITIONS, number)
            self.sent.append(value)
            sending = asyncio.create_task(self._until_acknowledged(number % NUM_PARTITIONS, value))
            self.waiting.add(sending)
            sending.add_done_callback(self.waiting.discard)
            number += 1
            await asyncio.sleep(SEND_INTERVAL_S)

    async def _until_acknowledged(self, partition, value):
        await self.producer.send(TOPIC, partition, value)
        self.acknowledged.add(value)

    async def _read(self):
        while True:
            self.read += await self.reader.read(1.0)


@asynccontextmanager
async def traffic(folder, num_brokers):
    async with kafka_cluster(folder, num_brokers) as brokers:
        address = ",".join(broker.spec.address for broker in brokers)
        await create_topics(address, [Topic(TOPIC, NUM_PARTITIONS)], replication_factor=num_brokers)
        traffic = Traffic(KafkaBus(address, client_id="test"))
        async with traffic.running():
            await traffic.again(0)
            yield traffic, brokers


async def started_again(brokers, index):
    died = brokers[index]
    await died.wait()
    brokers[index] = await Child.start(died.spec, died.log_path)
    await brokers[index].until_ready()


@pytest.mark.parametrize("num_brokers", [1, 3])
async def test_nothing_is_lost_while_a_broker_is_stopped_woken_and_killed(tmp_path, num_brokers, capsys):
    took = {}
    async with traffic(tmp_path, num_brokers) as (running, brokers):
        stopped = brokers[await running.leader(0) - 1]
        stopped.send_signal(signal.SIGSTOP)
        if num_brokers == 1:
            await asyncio.sleep(6)
            assert running.bus.silent_s() > 3, "said, so that nobody places anything here"
            stopped.send_signal(signal.SIGCONT)
        took["stopped"] = await running.again(0)
        stopped.send_signal(signal.SIGCONT)
        await running.again(1)

        index = await running.leader(1) - 1
        brokers[index].send_signal(signal.SIGKILL)
        if num_brokers == 1:
            await started_again(brokers, index)
        took["killed"] = await running.again(1)
        assert running.bus.silent_s() < 3
        if num_brokers == 3:
            await started_again(brokers, index)
        for partition in range(NUM_PARTITIONS):
            await running.again(partition)
    with capsys.disabled():
        told = {what: round(s, 2) for what, s in took.items()}
        print(f" {num_brokers} brokers, seconds to the next record: {told}")  # noqa: T201
