"""Parts of an item table in this process, as `serve.catalog.sharded` calls them elsewhere."""

from __future__ import annotations

from r2ec_fast.serve.catalog.records import of_record
from r2ec_fast.serve.catalog.sharded import ShardedTable, TableShard


class Shards:
    """``between(method, shard)`` is called before each call of a shard."""

    def __init__(self, index, count):
        self.index, self.count = index, count
        self.parts = [TableShard(index, i, count) for i in range(count)]
        self.between = lambda method, shard: None

    def ask(self, method, arguments):
        found = {}
        for shard, own in arguments.items():
            self.between(method, shard)
            found[shard] = getattr(self.parts[shard], method)(*own)
        return found

    def start_again(self, shard):
        """It has forgotten all changes."""
        self.parts[shard] = TableShard(self.index, shard, self.count)

    def table(self, log) -> ShardedTable:
        """The whole, as a process sees it that reads its changes from ``log``."""

        def rows_since(number):
            return [of_record(record)[1] for record in list(log)[number:]]

        return ShardedTable(self.index, self.count, self.ask, rows_since)
