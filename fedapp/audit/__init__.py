"""Audits: what an attacker who knows the canaries can prove about a mechanism, from one run."""
