"""PyTorch Geometric: graphs and point clouds, whose first dimension counts nodes and not samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap import Inputs

from . import Network, each

NODES, FEATURES = 24, 8


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return each("GCN GraphSAGE GIN GAT EdgeCNN", _basic) | {
        "PNA": _pna,
        "DeepGCN": _deep_gcn,
        "MLP": _mlp,
        "GraphUNet with BatchNorm": _graph_u_net,
        "PointNet of layers": _point_net,
    }


def _graph() -> tuple[Tensor, Tensor]:
    edges = torch.stack([torch.arange(NODES), torch.arange(1, NODES + 1) % NODES])
    return torch.randn(NODES, FEATURES), torch.cat([edges, edges.flip(0)], dim=1)


def _basic(name: str) -> Network:
    from torch_geometric.nn import models

    return Network(getattr(models, name)(FEATURES, 16, 3, 4, norm="batch_norm"), Inputs(*_graph()))


def _pna() -> Network:
    from torch_geometric.nn.models import PNA

    model = PNA(
        FEATURES, 16, 2, 4, norm="batch_norm", aggregators=["mean", "max"], scalers=["identity"], deg=torch.ones(3)
    )
    return Network(model, Inputs(*_graph()))


def _deep_gcn() -> Network:
    from torch_geometric.nn import BatchNorm, DeepGCNLayer, GENConv

    class DeepGCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(FEATURES, 16)
            self.layers = nn.ModuleList(
                DeepGCNLayer(GENConv(16, 16, norm="batch"), BatchNorm(16), nn.ReLU(), block="res+") for _ in range(3)
            )

        def forward(self, x: Tensor, edges: Tensor) -> Any:
            x = self.encode(x)
            for layer in self.layers:
                x = layer(x, edges)
            return x

    return Network(DeepGCN(), Inputs(*_graph()))


def _mlp() -> Network:
    from torch_geometric.nn.models import MLP

    return Network(MLP([FEATURES, 16, 16, 4]), Inputs(torch.randn(NODES, FEATURES)))


def _graph_u_net() -> Network:
    from torch_geometric.nn import BatchNorm, GraphUNet, Sequential

    model = Sequential(
        "x, edges", [(GraphUNet(FEATURES, 16, 16, depth=2), "x, edges -> x"), BatchNorm(16), nn.Linear(16, 4)]
    )
    return Network(model, Inputs(*_graph()))


def _point_net() -> Network:
    from torch_geometric.nn import MLP, PointNetConv, global_max_pool

    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = PointNetConv(MLP([3, 16, 16]))
            self.conv2 = PointNetConv(MLP([19, 32, 32]), MLP([32, 32]))
            self.head = MLP([32, 16, 4], dropout=0.5)

        def forward(self, positions: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
            x = self.conv1(None, positions, edges)
            return self.head(global_max_pool(self.conv2(x, positions, edges), batch))

    _, edges = _graph()
    return Network(PointNet(), Inputs(torch.randn(NODES, 3), edges, torch.arange(NODES) * 4 // NODES))
