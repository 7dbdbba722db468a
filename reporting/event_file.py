"""Write curves for TensorBoard."""
import os
import time
from collections.abc import Mapping
from typing import Any

SCALARS = ('loss', 'acc1', 'acc5', 'lr', 'images_per_s', 'data_wait', 'loss_scale')   # keys that are curves


class EventFile:
    """A TensorBoard event file in `folder` that replaces older files there from `purge_step` on.

    It writes as tensorboardX's SummaryWriter, but at once. The thread and the queue of that one do not
    go well with data processes that are forked and with runs that are killed.
    """

    def __init__(self, folder: str, purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        self.Event, self.Summary = event_pb2.Event, summary_pb2.Summary
        os.makedirs(folder, exist_ok=True)
        taken = len(os.listdir(folder))             # two files of the same second would have the same name
        self.file = EventsWriter(os.path.join(folder, 'events'), f'.{taken:04d}')
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self.Event(step=purge_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of one step, {curve: value}."""
        values = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(self.Event(step=step, summary=self.Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.file.write_event(event)
        self.file.flush()
