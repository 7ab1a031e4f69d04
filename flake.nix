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
      forEachSystem =
        f:
        lib.genAttrs [
          "x86_64-linux"
          "aarch64-linux"
          "aarch64-darwin"
        ] (system: f nixpkgs.legacyPackages.${system});
      build =
        pkgs:
        pkgs.callPackage ./nix/package.nix {
          craneLib = crane.mkLib pkgs;
          buildCraneLib = crane.mkLib pkgs.buildPackages;
          tests = self.checks.${pkgs.stdenv.hostPlatform.system} or { };
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
          codex-responses-proxy = package;
          # by the program's name, too
          codex-responses-api-proxy = package;
          inherit demo;
        }
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
          static = (build pkgs.pkgsStatic).package;
          # for systems with systemd that aren't NixOS; also in contrib/systemd
          units = pkgs.linkFarm "codex-responses-proxy-units" (
            lib.mapAttrs' (unit: text: {
              name = "lib/systemd/system/${unit}";
              value = pkgs.writeText unit text;
            }) (import ./nix/units.nix { inherit self nixpkgs; })
          );
        }
      );

      checks = forEachSystem (
        pkgs:
        import ./nix/checks.nix {
          inherit
            self
            nixpkgs
            crane
            pkgs
            ;
          built = build pkgs;
        }
      );

      nixosModules = {
        default = self.nixosModules.codex-responses-proxy;
        codex-responses-proxy = lib.modules.importApply ./nix/module.nix {
          packageFor = pkgs: (build pkgs).package;
        };
      };

      overlays.default = final: _prev: {
        codex-responses-proxy = (build final).package;
      };

      devShells = forEachSystem (pkgs: {
        default = (crane.mkLib pkgs).devShell {
          packages = [
            pkgs.cargo-deny
            pkgs.cargo-nextest
            pkgs.deadnix
            pkgs.nixfmt
          ];
        };
      });

      formatter = forEachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
