"""Transfer a persona vector from source to target in five ways (phase 3).

Vectors are (d_source,) in and (d_target,) out, float32. `ridge_mapped` is the method
under study and `oracle` the native vector; the other three know nothing of the
target and show what any vector of that length would do.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from ridge_mapping import RidgeMapping
from support.errors import InputError

METHODS = ("zero_pad", "interpolate", "random_proj", "ridge_mapped", "oracle")


class BaselineTransfer:
    """The naive transfers, the learned one and the oracle behind one interface.

    d_source, d_target: the models' residual-stream widths. seed: decides the random projection.
    """

    def __init__(self, d_source: int, d_target: int, seed: int = 0) -> None:
        self.d_source, self.d_target, self.seed = d_source, d_target, seed

    def zero_pad(self, v_source: Tensor) -> Tensor:
        """Return v_source followed by zeros; cut it where the target is narrower."""
        v_source = self._checked(v_source, self.d_source, "v_source")
        padded = torch.zeros(self.d_target)
        kept = min(self.d_source, self.d_target)
        padded[:kept] = v_source[:kept]
        return padded

    def interpolate(self, v_source: Tensor) -> Tensor:
        """Return v_source resampled linearly to d_target points (specification, "Interpolation")."""
        v_source = self._checked(v_source, self.d_source, "v_source")
        return interpolate(v_source[None, None], size=self.d_target, mode="linear", align_corners=False)[0, 0]

    def random_proj(self, v_source: Tensor) -> Tensor:
        """Return v_source times a seeded random matrix with orthonormal rows (or columns, if narrower).

        The Q factor of a Gaussian matrix, with signs fixed so that it is Haar-distributed
        (Mezzadri 2007, arXiv math-ph/0609050).
        """
        v_source = self._checked(v_source, self.d_source, "v_source")
        generator = torch.Generator().manual_seed(self.seed)
        wide, narrow = max(self.d_source, self.d_target), min(self.d_source, self.d_target)
        gaussian = torch.randn(wide, narrow, generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        orthonormal = (Q * R.diagonal().sign()).float()
        return v_source @ (orthonormal if self.d_source == wide else orthonormal.T)

    def ridge_mapped(self, v_source: Tensor, ridge_mapping: RidgeMapping) -> Tensor:
        """Return v_source @ W, without intercept."""
        v_source = self._checked(v_source, self.d_source, "v_source")
        return self._checked(ridge_mapping.transform(v_source), self.d_target, "the mapped vector")

    def oracle(self, v_oracle: Tensor) -> Tensor:
        """Return a copy of the native vector."""
        return self._checked(v_oracle, self.d_target, "v_oracle").clone()

    def apply_all_baselines(
        self,
        v_source: Tensor,
        v_oracle: Tensor,
        ridge_mapping: RidgeMapping,
        normalize: bool = True,
        other_maps: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Return method name -> (d_target,) for every method in METHODS, then for each other map.

        other_maps: name -> function that maps a direction, (d_source,) to (d_target,).
        normalize: scale each to unit L2 norm, so that one alpha is the same steering strength for all.
        Raises InputError: a wrong width, a vector that is not finite, or one of norm 0.
        """
        vectors = {
            "zero_pad": self.zero_pad(v_source),
            "interpolate": self.interpolate(v_source),
            "random_proj": self.random_proj(v_source),
            "ridge_mapped": self.ridge_mapped(v_source, ridge_mapping),
            "oracle": self.oracle(v_oracle),
        }
        for name, transform in (other_maps or {}).items():
            vectors[name] = self._checked(transform(v_source.float()), self.d_target, name)
        return {name: _unit(vector, name) for name, vector in vectors.items()} if normalize else vectors

    def compare_to_oracle(
        self,
        v_source: Tensor,
        v_oracle: Tensor,
        ridge_mapping: RidgeMapping,
        other_maps: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        left_out: Sequence[int] = (),
    ) -> dict[str, float]:
        """Return the cosine of each transferred vector to the oracle.

        A cosine alone misleads: a few massive dimensions can dominate it (METHODOLOGY.md).
        left_out: dimensions of the target that are set to 0 first.
        """
        vectors = self.apply_all_baselines(v_source, v_oracle, ridge_mapping, other_maps=other_maps)
        kept = torch.ones(self.d_target)
        kept[list(left_out)] = 0.0
        oracle = vectors.pop("oracle") * kept
        return {
            name: cosine_similarity(vector * kept, oracle, dim=0).item() for name, vector in vectors.items()
        }

    @staticmethod
    def _checked(vector: Tensor, width: int, name: str) -> Tensor:
        if vector.shape != (width,):
            raise InputError(f"{name} has shape {tuple(vector.shape)}, expected ({width},)")
        if not vector.isfinite().all():
            raise InputError(f"{name} has values that are not finite; extract it again in float32")
        return vector.detach().float().cpu()


def _unit(vector: Tensor, name: str) -> Tensor:
    norm = vector.norm()
    if norm == 0:
        raise InputError(f"the {name} vector has norm 0 and cannot be normalised")
    return vector / norm


def main() -> None:
    """Check that every transfer gives a unit vector, and that ridge_mapped finds a linear relation."""
    generator = torch.Generator().manual_seed(0)
    truth, H_source, v_source = (torch.randn(n, 30, generator=generator) for n in (50, 800, 1))
    mapping = RidgeMapping(30, 50).fit(H_source, H_source @ truth.T, lambda_=0.1)
    baseline = BaselineTransfer(d_source=30, d_target=50)
    given = (v_source[0], truth @ v_source[0], mapping)
    vectors, cosines = baseline.apply_all_baselines(*given), baseline.compare_to_oracle(*given)
    assert tuple(vectors) == METHODS
    assert all(vector.shape == (50,) and abs(vector.norm() - 1) < 1e-5 for vector in vectors.values())
    assert cosines["ridge_mapped"] > 0.999
    print("baseline_methods OK: cosines to the oracle", {k: round(v, 3) for k, v in cosines.items()})


if __name__ == "__main__":
    main()
