"""Keys: X25519 agreements, what is derived from them, sealed shares, and signed advertisements."""

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedapp.errors import DecodeError

KEY, COMMITMENT, TAG = 32, 16, 16
_LABEL = b"fedapp secure aggregation 1: "
_NONCE = bytes(12)  # a sealing key is used once: for one sender, one receiver and one session


def derive(secret: bytes, use: bytes, *context: bytes) -> bytes:
    """32 bytes for one use, by HKDF-SHA256; parts of the context have fixed sizes."""
    return HKDF(SHA256(), KEY, salt=None, info=_LABEL + use + b"".join(context)).derive(secret)


def public(private: bytes) -> bytes:
    """The public X25519 key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, other: bytes) -> bytes:
    """X25519; raises DecodeError on a public key of small order, which would fix the result."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise DecodeError("secure aggregation: a public key is not a point of large order") from None


def commit(seed: bytes) -> bytes:
    """What the server checks a reassembled self-mask seed against."""
    return derive(seed, b"commitment")[:COMMITMENT]


def self_mask(seed: bytes) -> bytes:
    """The key of a client's own mask."""
    return derive(seed, b"self mask")


def pair_mask(private: bytes, other: bytes, session: bytes) -> bytes:
    """The key of the mask that two clients share, the same at both."""
    return derive(agree(private, other), b"pair mask", session, *sorted((public(private), other)))


def seal(private: bytes, other: bytes, context: bytes, shares: bytes) -> bytes:
    """Shares that only the holder of `other` can read, and only in this context; 16 bytes longer."""
    key = derive(agree(private, other), b"seal", public(private), other)
    return ChaCha20Poly1305(key).encrypt(_NONCE, shares, context)


def unseal(private: bytes, other: bytes, context: bytes, sealed: bytes) -> bytes | None:
    """Undo `seal` at the other end; None if these are not bytes that it made."""
    key = derive(agree(private, other), b"seal", other, public(private))
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        return None


def advertisement_size(signed: bool) -> int:
    """Bytes of an advertisement: two keys, and if signed who signs and the signature."""
    return 2 * KEY + (KEY + 64 if signed else 0)


def advertise(masking: bytes, sealing: bytes, session: bytes, signing: bytes | None) -> bytes:
    """Two public keys of private ones, signed with a long-term Ed25519 key if there is one."""
    keys = public(masking) + public(sealing)
    if signing is None:
        return keys
    signer = Ed25519PrivateKey.from_private_bytes(signing)
    return keys + signer.public_key().public_bytes_raw() + signer.sign(_LABEL + session + keys)


def read_advertisement(data: bytes, session: bytes, roster: frozenset[bytes]) -> tuple[bytes, bytes, bytes]:
    """Masking key, sealing key and, with a roster, signer; raises DecodeError if it must not be used."""
    keys, signer, signature = data[: 2 * KEY], data[2 * KEY : 3 * KEY], data[3 * KEY :]
    for key in (keys[:KEY], keys[KEY:]):
        agree(bytes(KEY), key)
    if roster:
        if signer not in roster:
            raise DecodeError("secure aggregation: keys are signed by nobody on the roster")
        try:
            Ed25519PublicKey.from_public_bytes(signer).verify(signature, _LABEL + session + keys)
        except (InvalidSignature, ValueError):
            raise DecodeError("secure aggregation: keys carry a wrong signature") from None
    return keys[:KEY], keys[KEY:], signer
