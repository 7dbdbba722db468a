"""Read event files as TensorBoard does."""
import os
import struct

from tensorboardX.proto import event_pb2


def read_events(folder):
    """{(step, tag): value} as TensorBoard reads a folder: the start of a session drops later steps."""
    kept = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), 'rb') as file:
            while head := file.read(12):
                event = event_pb2.Event.FromString(file.read(struct.unpack('<Q', head[:8])[0]))
                file.read(4)
                if event.HasField('session_log'):
                    kept = {key: value for key, value in kept.items() if key[0] < event.step}
                for value in event.summary.value:
                    assert (event.step, value.tag) not in kept
                    kept[event.step, value.tag] = value.simple_value
    return kept
