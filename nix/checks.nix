# The checks that `nix flake check` builds.
{
  self,
  nixpkgs,
  crane,
  pkgs,
  built,
}:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system isLinux;
  inherit (built) craneLib dev sources;
  inherit (self.packages.${system}) static;
  exe = lib.getExe built.package;

  # Matches store paths in a file. Nix's base 32 has no e, so it doesn't match the paths that crane overwrote with e.
  storePath = "${builtins.storeDir}/[0-9a-df-np-sv-z]{32}-[a-zA-Z0-9+._?=-]+";

  nixFiles = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.fileFilter (file: file.hasExt "nix") ../.;
  };
  # Runs a linter on every Nix file.
  lint =
    tool: command:
    pkgs.runCommand "codex-responses-proxy-${lib.getName tool}" { nativeBuildInputs = [ tool ]; } ''
      find ${nixFiles} -name '*.nix' -print0 | xargs -0 ${command}
      touch $out
    '';
in
{
  # The program starts and holds no path of the toolchain or of a dependency's source. Its man page and completions
  # have its flags.
  package = pkgs.runCommand "codex-responses-proxy-package" { } ''
    ${exe} --version
    ${exe} --help >/dev/null
    cd ${built.package}/share
    zcat man/man1/*.1.gz | grep -q 'upstream.*url'
    for completions in bash-completion/completions zsh/site-functions fish/vendor_completions.d; do
      grep -q upstream-url $completions/*
    done
    { grep -aohE '${storePath}' ${exe} || true; } | sort -u | tee $out
    if grep -E -- '-(cargo|rust|vendor|source|gcc-wrapper|clang-wrapper)' $out; then
      echo "the program holds paths of its build inputs" >&2
      exit 1
    fi
  '';

  # default.nix has the outputs of the flake.
  without-flakes =
    let
      imported = import ../default.nix { inherit nixpkgs crane; };
    in
    assert imported.packages.${system}.default.drvPath == self.packages.${system}.default.drvPath;
    assert lib.attrNames imported.nixosModules == lib.attrNames self.nixosModules;
    pkgs.emptyFile;

  # The demo runs to its end.
  demo = pkgs.runCommand "codex-responses-proxy-demo-check" { } ''
    ${lib.getExe built.demo} </dev/null
    touch $out
  '';

  clippy = craneLib.cargoClippy (
    dev // { cargoClippyExtraArgs = "--workspace --all-targets -- --deny warnings"; }
  );

  fmt = craneLib.cargoFmt {
    src = sources.all;
    cargoExtraArgs = "--all";
    doInstallCargoArtifacts = false;
  };

  nextest = craneLib.cargoNextest (
    dev
    // {
      cargoExtraArgs = "--locked";
      cargoNextestExtraArgs = "--no-fail-fast";
    }
  );

  doc = craneLib.cargoDoc (
    dev
    // {
      env = dev.env // {
        RUSTDOCFLAGS = "--deny warnings";
      };
    }
  );

  # Advisories change daily and need the network: see .github/workflows/advisories.yml.
  deny = craneLib.cargoDeny {
    src = sources.deny;
    cargoDenyChecks = "bans licenses sources";
  };

  nixfmt = lint pkgs.nixfmt "nixfmt --check";
  deadnix = lint pkgs.deadnix "deadnix --fail";
}
// lib.optionalAttrs isLinux {
  # The static build runs, needs no loader and holds no store path.
  static = pkgs.runCommandCC "codex-responses-proxy-static" { } ''
    ${lib.getExe static} --version
    if readelf -lW ${lib.getExe static} | grep INTERP; then exit 1; fi
    if grep -aohE '${storePath}' ${lib.getExe static}; then exit 1; fi
    touch $out
  '';

  unit = import ./tests/module.nix { inherit self nixpkgs pkgs; };

  examples = import ./tests/examples.nix { inherit self nixpkgs pkgs; };

  vm = pkgs.testers.runNixOSTest (import ./tests/vm.nix { inherit self; });
}
