# The flake's outputs without flakes: `(import ./. { }).nixosModules.default`, `nix-build -A packages.x86_64-linux.default`.
# nixpkgs and crane are those that flake.lock pins, unless they are given, as paths or as flakes.
let
  inherit (builtins.fromJSON (builtins.readFile ./flake.lock)) nodes;
  locked =
    name:
    let
      inherit (nodes.${name}) locked;
    in
    fetchTarball {
      url = "https://github.com/${locked.owner}/${locked.repo}/archive/${locked.rev}.tar.gz";
      sha256 = locked.narHash;
    };

  outputs =
    path: inputs:
    let
      self = (import (path + "/flake.nix")).outputs (inputs // { inherit self; }) // {
        outPath = path;
      };
    in
    self;
  flake = input: if input._type or "" == "flake" then input else outputs input { };
in
{
  nixpkgs ? locked "nixpkgs",
  crane ? locked "crane",
}:
outputs ./. {
  nixpkgs = flake nixpkgs;
  crane = flake crane;
}
