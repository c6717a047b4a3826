from .formats import unpair_preference_dataset


__all__ = ["unpair_preference_dataset"]
