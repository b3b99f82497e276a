"""The product layer of PNN as a term: an MLP that reads products of embeddings beside the embeddings."""

from __future__ import annotations

import numpy as np
import torch

from model.dense.mlp import Mlp
from model.dense.term import Graph, GraphInputs, Inputs, Part, Shape

__all__ = ["ProductMlp"]


class ProductMlp(Mlp):
    """An MLP over embeddings and their products (Qu et al., "Product-based Neural Networks", ICDM 2016, section III).

    Its first layer is relu(l_z + l_p + b), where l_z is linear in the embeddings and l_p in the products p (equation 3). The
    products are, with `inner` and `outer`:

    - inner (section III.B): <e_i, e_j> for all fields i and j;
    - outer (section III.C): s s^T, where s is the sum of the embeddings (the paper's superposition of all e_i e_j^T).

    Both matrices are symmetric, so one half of each with its diagonal is enough: l_p can be the same linear functions of it.
    """

    def __init__(self, shape: Shape, hidden: tuple[int, ...], *, inner: bool, outer: bool, device: torch.device) -> None:
        self._shape = shape
        self._inner = _Half(shape.fields if inner else 0, device)
        self._outer = _Half(shape.dim if outer else 0, device)
        super().__init__(shape, hidden, self._inner.count + self._outer.count)

    def forward(self, inputs: Inputs) -> Part:
        """Saves the input of each layer (B, ·): embeddings, extra inputs, inner products, outer products; and s, (B, D)."""
        read = [inputs.wide]
        total = inputs.embedded.sum(1)  # (B, D)
        if self._inner.count:
            read.append(self._inner.of(torch.bmm(inputs.embedded, inputs.embedded.transpose(1, 2))))
        if self._outer.count:
            read.append(self._outer.of(total.unsqueeze(2) * total.unsqueeze(1)))
        part = self._forward(torch.cat(read, 1))
        return Part(part.logits, [*part.saved, total])

    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        """With G the gradient by a symmetric matrix of products, that by its factor e is (G + G^T) e."""
        *activations, total = saved
        upstream = self._backward(activations, slope) @ self._weights[0]  # (B, all inputs)
        by_embedded = upstream[:, : self._shape.embedded].reshape(-1, self._shape.fields, self._shape.dim)
        outer_from = self._shape.inputs + self._inner.count
        if self._inner.count:
            both = self._inner.both(upstream[:, self._shape.inputs : outer_from])  # (B, F, F)
            by_embedded = torch.baddbmm(by_embedded, both, inputs.embedded)
        if self._outer.count:
            both = self._outer.both(upstream[:, outer_from:])  # (B, D, D)
            by_embedded = by_embedded + torch.bmm(both, total.unsqueeze(2)).transpose(1, 2)
        own = by_embedded.flatten(1)
        return own if gradient is None else gradient.add_(own)

    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        read = [inputs.wide]
        if self._inner.count:
            other = graph.node("Transpose", inputs.embedded, perm=[0, 2, 1])
            read.append(self._inner.export(graph, graph.node("MatMul", inputs.embedded, other)))
        if self._outer.count:
            one = graph.constant(np.array([1], np.int64))
            total = graph.node("ReduceSum", inputs.embedded, one, keepdims=1)  # (B, 1, D)
            read.append(self._outer.export(graph, graph.node("MatMul", graph.node("Transpose", total, perm=[0, 2, 1]), total)))
        return self._export(graph, graph.node("Concat", *read, axis=1))


class _Half:
    """The entries (i, j) with i <= j of symmetric matrices (B, n, n), as rows (B, count)."""

    def __init__(self, size: int, device: torch.device) -> None:
        upper = torch.triu_indices(size, size)
        self.count = upper.shape[1]
        self._size = size
        self._at = (upper[0] * size + upper[1]).to(device)  # where they are in the n*n entries of a matrix
        entry = torch.zeros((size, size), dtype=torch.int64)
        entry[upper[0], upper[1]] = torch.arange(self.count)
        entry[upper[1], upper[0]] = torch.arange(self.count)
        self._entry = entry.flatten().to(device)

    def of(self, matrices: torch.Tensor) -> torch.Tensor:
        return matrices.flatten(1).index_select(1, self._at)

    def both(self, gradient: torch.Tensor) -> torch.Tensor:
        """G + G^T (B, n, n), where G is the gradient by the matrices and `gradient` that by their entries."""
        both = gradient.index_select(1, self._entry).view(-1, self._size, self._size)
        both.diagonal(dim1=1, dim2=2).mul_(2)
        return both

    def export(self, graph: Graph, matrices: str) -> str:
        flat = graph.node("Reshape", matrices, graph.constant(np.array([-1, self._size * self._size], np.int64)))
        return graph.node("Gather", flat, graph.constant(self._at.cpu().numpy()), axis=1)
