"""Unsigned integers of any size in as few bytes as they need (LEB128), and a reader that trusts nothing."""

from fedapp.errors import DecodeError


def varint(value: int) -> bytes:
    """Seven bits a byte, least significant first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Takes fields off the front of received bytes; raises DecodeError where they run out."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.left = memoryview(data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.left):
            raise DecodeError(f"packet ends {count - len(self.left)} bytes early")
        head, self.left = self.left[:count], self.left[count:]
        return bytes(head)

    def varint(self, most: int) -> int:
        """The next varint, which may not exceed `most`."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if value > most or shift > 63:
                raise DecodeError(f"a count in the packet is above {most}")
            if byte < 0x80:
                return value
            shift += 7

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self.left))

    def end(self) -> None:
        """Nothing may be left."""
        if len(self.left):
            raise DecodeError(f"packet has {len(self.left)} bytes too many")
