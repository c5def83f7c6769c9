"""Networks after those that the field trains, small: on images and volumes. Each is a function that makes one, with the shape of its queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from registered import registry
from torch import Tensor, nn

IMAGES, image = registry()


# -- plain ones --------------------------------------------------------------------------------------------------------


@image(1, 16, 16)
def lenet() -> nn.Module:
    features = (nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 5))


@image(3, 12, 12)
def zoo_cnn_with_batch_norm() -> nn.Module:
    def block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU(), nn.Dropout(0.2))

    return nn.Sequential(block(3, 6), nn.MaxPool2d(2), block(6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


@image(3, 12, 12)
def batch_norms_ahead() -> nn.Module:
    first = (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    second = (nn.BatchNorm2d(4, affine=False), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*first, *second, nn.BatchNorm1d(20), nn.Linear(20, 4))


@image(3, 16, 16)
def vgg() -> nn.Module:
    def block(i: int, o: int) -> tuple[nn.Module, ...]:
        return (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(o, o, 3, padding=1), nn.ReLU(inplace=True))

    return nn.Sequential(*block(3, 4), nn.MaxPool2d(2), *block(4, 6), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(1), nn.Linear(24, 3))


@image(1, 12, 12)
def every_norm() -> nn.Module:
    norms = (
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.LayerNorm((4, 12, 12)),
    )
    blocks = [part for norm in (*norms, nn.LocalResponseNorm(3)) for part in (nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, nn.SiLU())]
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(576, 3))


@image(2, 10, 10)
def every_activation() -> nn.Module:
    kinds = (
        nn.ReLU,
        nn.LeakyReLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Hardtanh,
        nn.ReLU6,
        nn.Softplus,
    )
    more = (nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.Softshrink, nn.RReLU, nn.Hardshrink)
    blocks = [part for kind in (*kinds, *more) for part in (nn.Conv2d(3, 3, 1), kind())]
    return nn.Sequential(nn.Conv2d(2, 3, 3), *blocks, nn.Softmax2d(), nn.Flatten(), nn.Linear(192, 2), nn.Softmin(dim=-1))


@image(2, 13, 13)
def every_pooling() -> nn.Module:
    pools = (
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AdaptiveMaxPool2d(5),
    )
    more = (nn.LPPool2d(2, 2, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d((3, None)))
    blocks = [part for pool in (*pools, *more) for part in (nn.Conv2d(3, 3, 1), nn.Softplus(), pool)]
    return nn.Sequential(nn.Conv2d(2, 3, 1), *blocks, nn.Flatten(), nn.LazyLinear(3)).eval()


@image(2, 9, 9)
def every_padding() -> nn.Module:
    modes = [nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode) for mode in ("zeros", "reflect", "replicate", "circular")]
    pads = (
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.ReflectionPad2d(1),
        nn.ConstantPad2d((0, 1, 1, 0), 0.3),
        nn.Conv2d(3, 2, 2, padding="same"),
        nn.Conv2d(2, 2, 3, padding="valid", dilation=2),
    )
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(2, 0)), *(part for m in modes for part in (m, nn.Tanh())), *pads, nn.Flatten(1), nn.LazyLinear(3)
    )


@image(1, 14, 14)
class MnistExample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, 1), nn.Conv2d(4, 6, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(150, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


# -- residual ones -----------------------------------------------------------------------------------------------------


class _Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(o)
        plain = stride == 1 and i == o
        self.downsample = None if plain else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


@image(3, 12, 12)
class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList([_Basic(8, 8), _Basic(8, 16, 2), _Basic(16, 16, groups=4)])
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


@image(3, 8, 8)
class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(F.relu(norm(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norms[-1](x)), 1).squeeze(-1).squeeze(-1))


class _Inverted(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        wide = 2 * i
        self.add = stride == 1 and i == o
        expand = (nn.Conv2d(i, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True))
        depth = (nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(True))
        self.before, self.after = nn.Sequential(*expand, *depth), nn.Sequential(nn.Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o))
        self.squeeze, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        h = h * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        return x + self.after(h) if self.add else self.after(h)


@image(3, 12, 12)
def mobilenet() -> nn.Module:
    stem = (nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.Hardswish())
    return nn.Sequential(
        *stem, _Inverted(4, 4, 1), _Inverted(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 3)
    )


@image(3, 10, 10)
class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1)) for i in range(3)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 5, 1), nn.AvgPool2d(2))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return self.fc(self.transition(torch.cat(seen, 1)).flatten(2).mean(-1))


@image(2, 8, 8)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def two(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU())

        self.down1, self.down2, self.middle = two(2, 4), two(4, 6), two(6, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.right2, self.right1, self.out = two(12, 6), two(8, 4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.middle(F.max_pool2d(b, 2))
        x = self.right2(torch.cat((self.up2(x), b), 1))
        return self.out(self.right1(torch.cat((self.up1(x), a), 1)))


class _Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


@image(3, 8, 8)
def convmixer() -> nn.Module:
    def block() -> tuple[nn.Module, ...]:
        depth = _Residual(nn.Conv2d(6, 6, 3, groups=6, padding="same"), nn.GELU(), nn.BatchNorm2d(6))
        return depth, nn.Conv2d(6, 6, 1), nn.GELU(), nn.BatchNorm2d(6)

    return nn.Sequential(
        nn.Conv2d(3, 6, 2, 2), nn.GELU(), nn.BatchNorm2d(6), *block(), *block(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 3)
    )


@image(3, 8, 8)
class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6, 1e-6)
        self.wide, self.narrow, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), nn.Parameter(torch.full((6,), 0.1))
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.depth(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(F.gelu(self.wide(h)))
        x = x + h.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean([-2, -1])))


@image(3, 8, 8)
class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), nn.Linear(8, 3)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):  # one branch twice: its weights are shared
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, F.relu(self.branch(b))), 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(x.amax((2, 3)))


@image(3, 8, 8)
class SqueezeAndExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.squeeze, self.excite, self.head = nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        made = self.branch(x)
        factor = torch.sigmoid(self.excite(F.relu(self.squeeze(made.mean((2, 3))))))
        return self.head(F.relu(x + made * factor[:, :, None, None]).mean((2, 3)))


@image(3, 9, 9)
class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.one, self.three = (
            nn.Conv2d(3, 6, 3, 2),
            nn.Conv2d(6, 3, 1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 3, padding=1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 1, ceil_mode=True)
        x = F.relu(self.squeeze(x), inplace=True)
        x = torch.cat([F.relu(self.one(x), inplace=True), F.relu(self.three(x), inplace=True)], 1)
        return torch.flatten(self.classifier(x), 1)


@image(1, 8, 8)
class PolicyOfImages(nn.Module):
    """A dueling value head behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 4, 2), nn.ReLU(), nn.Conv2d(4, 6, 2, 1), nn.ReLU(), nn.Flatten())
        self.advantage, self.value = nn.Linear(24, 4), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x / 255.0 * 200)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(1, keepdim=True)


# -- autoencoders, generators, volumes ---------------------------------------------------------------------------------


@image(1, 8, 8)
class ConvolutionalAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
        )
        self.decoder = nn.Sequential(
            nn.Linear(5, 24), nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@image(6)
def generator() -> nn.Module:
    def up(i: int, o: int, k: int, s: int, p: int) -> tuple[nn.Module, ...]:
        return (nn.ConvTranspose2d(i, o, k, s, p, bias=False), nn.BatchNorm2d(o), nn.ReLU(True))

    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), *up(6, 5, 3, 1, 0), *up(5, 4, 4, 2, 1), nn.ConvTranspose2d(4, 1, 3, 1, 1), nn.Tanh())


@image(1, 6, 6, 6)
def volumes() -> nn.Module:
    first = (nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 2, groups=2), nn.GroupNorm(2, 4))
    return nn.Sequential(*first, nn.ELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))


@image(2, 8, 8)
class Capsules(nn.Module):
    """Super-resolution by pixel shuffle beside a bilinear way, and a spatial transformer ahead of both."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.conv, self.side = nn.Linear(128, 6), nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.1 * self.where(x.flatten(1)).view(-1, 2, 3) + torch.eye(2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(self.side(x), scale_factor=2, mode="bilinear", align_corners=False)
