"""The cheap form of chunk messages is protobuf's own, read and written."""

from __future__ import annotations

import zlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fleetune.errors import WireError
from fleetune.v1 import blob_pb2, messages_pb2
from fleetune.wire import frames

HEADER = blob_pb2.UploadHeader(device_id="d", task_id="t", lease=7, blob=messages_pb2.BlobRef(digest="ab", size_bytes=9))

offsets = st.integers(0, 2**64 - 1)
sums = st.integers(0, 2**32 - 1)


@given(offsets, st.binary(max_size=300), sums, st.booleans())
def test_protobuf_reads_an_encoded_upload(offset: int, data: bytes, crc32: int, with_header: bool) -> None:
    header = HEADER if with_header else None
    read = blob_pb2.UploadRequest.FromString(frames.encode_upload(frames.Upload(header, frames.Chunk(offset, data, crc32))))
    assert read == blob_pb2.UploadRequest(header=header, chunk=blob_pb2.Chunk(offset=offset, data=data, crc32=crc32))


@given(offsets, st.binary(max_size=300), sums, st.booleans())
def test_an_upload_of_protobuf_is_decoded(offset: int, data: bytes, crc32: int, with_header: bool) -> None:
    header = HEADER if with_header else None
    message = blob_pb2.UploadRequest(header=header, chunk=blob_pb2.Chunk(offset=offset, data=data, crc32=crc32))
    assert frames.decode_upload(message.SerializeToString()) == frames.Upload(header, frames.Chunk(offset, data, crc32))


@given(offsets, st.binary(max_size=300), sums, offsets)
def test_a_download_goes_there_and_back_through_protobuf(offset: int, data: bytes, crc32: int, size_bytes: int) -> None:
    raw = frames.encode_download(frames.Download(frames.Chunk(offset, data, crc32), size_bytes))
    message = blob_pb2.DownloadResponse.FromString(raw)
    assert message == blob_pb2.DownloadResponse(chunk=blob_pb2.Chunk(offset=offset, data=data, crc32=crc32), size_bytes=size_bytes)
    assert frames.decode_download(message.SerializeToString()) == frames.Download(frames.Chunk(offset, data, crc32), size_bytes)


def test_messages_without_a_chunk_are_as_small_as_protobufs() -> None:
    assert frames.encode_upload(frames.Upload(HEADER)) == blob_pb2.UploadRequest(header=HEADER).SerializeToString()
    assert frames.decode_upload(b"") == frames.Upload()
    assert frames.encode_download(frames.Download(None, 12)) == blob_pb2.DownloadResponse(size_bytes=12).SerializeToString()


def test_a_known_checksum_is_taken_as_it_is() -> None:
    assert frames.chunk_of(0, b"abc").crc32 == zlib.crc32(b"abc")
    assert frames.chunk_of(0, b"abc", 5).crc32 == 5


def test_fields_of_a_newer_version_are_passed_over() -> None:
    raw = frames.encode_upload(frames.Upload(HEADER, frames.chunk_of(3, b"data")))
    newer = raw + b"\xb8\x3e\x01" + b"\xc1\x3e" + bytes(8) + b"\xca\x3e\x02ab" + b"\xd5\x3e" + bytes(4)
    assert frames.decode_upload(newer) == frames.decode_upload(raw)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_a_wire_error(raw: bytes) -> None:
    for decode in (frames.decode_upload, frames.decode_download):
        try:
            decode(raw)
        except WireError:
            pass


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_message_that_was_cut_is_refused(cut: int) -> None:
    raw = frames.encode_upload(frames.Upload(None, frames.chunk_of(300, b"0123456")))
    with pytest.raises(WireError):
        frames.decode_upload(raw[:-cut])


def test_two_chunks_in_a_message_are_refused() -> None:
    raw = frames.encode_upload(frames.Upload(None, frames.chunk_of(0, b"a")))
    with pytest.raises(WireError, match="two chunks"):
        frames.decode_upload(raw + raw)


@pytest.mark.parametrize(
    "tag", [b"\x00", b"\x07", b"\x80\x00", b"\x80\x80\x80\x80\x10", b"\xff" * 9 + b"\x01", b"\xb0\x80\x80\x80\x80\x00"]
)
def test_a_field_number_that_protobuf_does_not_know_is_refused_inside_a_chunk(tag: bytes) -> None:
    inside = tag + b"\x00"
    raw = b"\x12" + bytes((len(inside),)) + inside
    with pytest.raises(DecodeError):
        blob_pb2.UploadRequest.FromString(raw)
    with pytest.raises(WireError):
        frames.decode_upload(raw)
