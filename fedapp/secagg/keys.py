"""Keys: X25519 agreements, what is derived from them, sealed shares, and what long-term keys sign."""

from collections.abc import Iterable
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedapp.errors import DecodeError

KEY, COMMITMENT, TAG, SIGNATURE = 32, 16, 16, 64
SIGNED = 3 * KEY  # of an advertisement that is signed: two keys, and by whom
_LABEL = b"fedapp secure aggregation 1: "
_NONCE = bytes(12)  # a sealing key is used once: for one sender, one receiver and one session


def derive(secret: bytes, use: bytes, *context: bytes) -> bytes:
    """32 bytes for one use, by HKDF-SHA256; parts of the context have fixed sizes."""
    return HKDF(SHA256(), KEY, salt=None, info=_LABEL + use + b"".join(context)).derive(secret)


class Private:
    """A private X25519 key of 32 bytes, and its public one. To load it takes as long as to agree with it."""

    def __init__(self, raw: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(raw)
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, other: bytes) -> bytes:
        """X25519; raises DecodeError on a public key of small order, which would fix the result."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:
            raise DecodeError("secure aggregation: a public key is not a point of large order") from None


_ANY = Private(bytes(KEY))  # finds points of small order


def commit(seed: bytes) -> bytes:
    """What the server checks a reassembled self-mask seed against."""
    return derive(seed, b"commitment")[:COMMITMENT]


def self_mask(seed: bytes) -> bytes:
    """The key of a client's own mask."""
    return derive(seed, b"self mask")


def pair_mask(private: Private, other: bytes, session: bytes) -> bytes:
    """The key of the mask that two clients share, the same at both."""
    return derive(private.agree(other), b"pair mask", session, *sorted((private.public, other)))


def seal(private: Private, other: bytes, context: bytes, shares: bytes) -> bytes:
    """Shares that only the holder of `other` can read, and only in this context; 16 bytes longer."""
    key = derive(private.agree(other), b"seal", private.public, other)
    return ChaCha20Poly1305(key).encrypt(_NONCE, shares, context)


def unseal(private: Private, other: bytes, context: bytes, sealed: bytes) -> bytes | None:
    """Undo `seal` at the other end; None if these are not bytes that it made."""
    key = derive(private.agree(other), b"seal", other, private.public)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        return None


def advertisement_size(signed: bool) -> int:
    """Bytes of an advertisement: two keys, and if signed who signs and the signature."""
    return 2 * KEY + (KEY + SIGNATURE if signed else 0)


def advertise(masking: bytes, sealing: bytes, session: bytes, signing: bytes | None) -> bytes:
    """Two public keys of private ones, signed with a long-term Ed25519 key if there is one."""
    keys = Private(masking).public + Private(sealing).public
    if signing is None:
        return keys
    return keys + signer(signing) + _sign(signing, session + keys)


def read_advertisement(data: bytes, session: bytes, roster: frozenset[bytes]) -> tuple[bytes, bytes, bytes]:
    """Masking key, sealing key and, with a roster, signer; raises DecodeError if it must not be used."""
    keys, signer, signature = data[: 2 * KEY], data[2 * KEY : SIGNED], data[SIGNED:]
    for key in (keys[:KEY], keys[KEY:]):
        _ANY.agree(key)
    if roster:
        if signer not in roster:
            raise DecodeError("secure aggregation: keys are signed by nobody on the roster")
        _verify(signer, signature, session + keys, "keys carry")
    return keys[:KEY], keys[KEY:], signer


def signer(signing: bytes) -> bytes:
    """The public key of a long-term one."""
    return Ed25519PrivateKey.from_private_bytes(signing).public_key().public_bytes_raw()


def view(session: bytes, signed: Iterable[bytes]) -> bytes:
    """What a session is to who takes part: a digest of the keys of all, and of who they are, by position."""
    return sha256(_LABEL + b"view" + session + b"".join(signed)).digest()


def confirm(signing: bytes, view: bytes, survivors: bytes) -> bytes:
    """The signature of a client that will open the sum of these survivors of the session, and no other."""
    return _sign(signing, _survivors(view, survivors))


def read_confirmation(signer: bytes, signature: bytes, view: bytes, survivors: bytes) -> None:
    """Raises DecodeError unless this signer has signed that."""
    _verify(signer, signature, _survivors(view, survivors), "who is alive carries")


def _survivors(view: bytes, survivors: bytes) -> bytes:
    return sha256(b"survivors" + view + survivors).digest()  # shorter than what advertisements sign


def _sign(signing: bytes, text: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(signing).sign(_LABEL + text)


def _verify(signer: bytes, signature: bytes, text: bytes, what: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, _LABEL + text)
    except (InvalidSignature, ValueError):
        raise DecodeError(f"secure aggregation: {what} a wrong signature") from None
