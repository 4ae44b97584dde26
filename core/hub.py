"""What of the hub lies in its local cache."""

from __future__ import annotations


def hub_cache() -> list[tuple[str, float]]:
    """Models of the hub that are in its local cache: (name, MiB)."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(
        (r.repo_id, r.size_on_disk / 2**20) for r in repositories if r.repo_type == "model"
    )
