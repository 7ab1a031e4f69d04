{
  description = "Lets unprivileged users run Codex without holding the OpenAI API key";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    crane.url = "github:ipetkov/crane";
  };

  outputs =
    {
      self,
      nixpkgs,
      crane,
    }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "aarch64-darwin"
      ];
      forEachSystem = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      # Formatter and linters for Nix. On Linux they come from the package set of a NixOS machine: the same
      # one, but there also where a stand-in for legacyPackages lends the host's tools to builds.
      nixTools =
        pkgs:
        let
          inherit (pkgs.stdenv.hostPlatform) isLinux system;
          machine = lib.nixosSystem { modules = [ { nixpkgs.hostPlatform = system; } ]; };
          tools = if isLinux then machine.pkgs else pkgs;
        in
        {
          inherit (tools) deadnix nixfmt-tree statix;
          # the same output as the original, with no Haskell compiler to build it
          nixfmt = tools.nixfmt-rs or tools.nixfmt;
        };
      build =
        pkgs:
        pkgs.callPackage ./nix/package.nix {
          craneLib = crane.mkLib pkgs;
        };
    in
    {
      packages = forEachSystem (
        pkgs:
        let
          inherit (build pkgs) package demo;
        in
        {
          default = package;
          codex-responses-api-proxy = package;
          inherit demo;
        }
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
          static = (build pkgs.pkgsStatic).package;
        }
      );

      checks = forEachSystem (
        pkgs:
        import ./nix/checks.nix {
          inherit self nixpkgs pkgs;
          built = build pkgs;
          inherit (nixTools pkgs) nixfmt;
        }
      );

      nixosModules = {
        default = self.nixosModules.codex-responses-proxy;
        codex-responses-proxy = lib.modules.importApply ./nix/module.nix { inherit self; };
      };

      overlays.default = final: _prev: {
        codex-responses-proxy = (build final).package;
      };

      devShells = forEachSystem (pkgs: {
        default = (crane.mkLib pkgs).devShell {
          packages = [
            pkgs.cargo-deny
            pkgs.cargo-nextest
            (nixTools pkgs).deadnix
            (nixTools pkgs).nixfmt
            (nixTools pkgs).statix
          ];
        };
      });

      formatter = forEachSystem (
        pkgs:
        let
          inherit (nixTools pkgs) nixfmt nixfmt-tree;
        in
        nixfmt-tree.override { nixfmtPackage = nixfmt; }
      );
    };
}
