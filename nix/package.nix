# The program and its demo, and what the checks need to build more.
{
  lib,
  installShellFiles,
  craneLib,
  # crane for the machine that builds: what it makes is run there
  buildCraneLib,
  # passthru.tests of the program
  tests,
}:
let
  fs = lib.fileset;
  source =
    files:
    fs.toSource {
      root = ../.;
      fileset = fs.unions files;
    };

  # What the program is made of. Nothing else changes its store path.
  program = [
    ../.cargo/config.toml
    ../Cargo.lock
    ../Cargo.toml
    ../src
    ../xtask
  ];
  sources = {
    program = source program;
    # everything that cargo compiles
    all = source (
      program
      ++ [
        ../benches
        (fs.difference ../examples ../examples/nixos)
        (fs.difference ../tests ../tests/systemd)
      ]
    );
    deny = source (program ++ [ ../deny.toml ]);
  };

  common = {
    strictDeps = true;
    # tests and the demo listen on loopback
    __darwinAllowLocalNetworking = true;
    # aws-lc is built from source: no library of the system's slips in
    env.AWS_LC_SYS_USE_SYSTEM = "0";
  };

  # In release, with no tests and what they depend on: all that installing the program takes.
  releaseArgs = common // {
    src = sources.program;
    doCheck = false;
  };
  release = releaseArgs // {
    cargoArtifacts = craneLib.buildDepsOnly (
      releaseArgs // { buildPhaseCargoCommand = "cargoWithProfile build --locked"; }
    );
  };

  # For the demo and the checks, so that not every test goes through link-time optimisation.
  devArgs = common // {
    src = sources.all;
    CARGO_PROFILE = "dev";
    env = common.env // {
      # glibc warns about nixpkgs' _FORTIFY_SOURCE where C code is not optimised
      CARGO_PROFILE_DEV_OPT_LEVEL = "1";
      CARGO_PROFILE_DEV_DEBUG = "line-tables-only";
    };
  };
  dev = devArgs // {
    cargoArtifacts = craneLib.buildDepsOnly devArgs;
    doInstallCargoArtifacts = false;
  };

  meta = {
    description = "Lets unprivileged users run Codex without holding the OpenAI API key";
    longDescription = ''
      A proxy on loopback that reads an OpenAI API key from its standard input,
      forwards POST /v1/responses with that key added, and refuses everything
      else. It takes the command lines of OpenAI's own codex-responses-api-proxy.
    '';
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "codex-responses-api-proxy";
    maintainers = [ ];
    platforms = lib.platforms.linux ++ lib.platforms.darwin;
  };

  # The man page and the completions. They are the same for every platform, so they are made on the one that builds.
  assets = buildCraneLib.mkCargoDerivation {
    pname = "codex-responses-proxy-assets";
    src = sources.program;
    strictDeps = true;
    cargoArtifacts = null;
    doInstallCargoArtifacts = false;
    CARGO_PROFILE = "dev";
    buildPhaseCargoCommand = "cargoWithProfile run --locked --package xtask -- $out";
  };

  package = craneLib.buildPackage (
    release
    // {
      inherit meta;
      nativeBuildInputs = [ installShellFiles ];
      postInstall = ''
        installManPage ${assets}/${meta.mainProgram}.1
        installShellCompletion --cmd ${meta.mainProgram} \
          --bash ${assets}/${meta.mainProgram}.bash \
          --zsh ${assets}/_${meta.mainProgram} \
          --fish ${assets}/${meta.mainProgram}.fish
      '';
      doInstallCheck = true;
      installCheckPhase = ''
        runHook preInstallCheck
        $out/bin/${meta.mainProgram} --version | grep --fixed-strings "$version"
        runHook postInstallCheck
      '';
      # no trace of where it was built
      disallowedReferences = [
        assets
        package.cargoVendorDir
      ];
      passthru = { inherit assets tests; };
    }
  );

  demo = craneLib.buildPackage (
    dev
    // {
      pname = "codex-responses-proxy-demo";
      cargoBuildExtraArgs = "--example demo";
      # the check `nextest` runs the tests
      doCheck = false;
      postInstall = "mv $out/bin/demo $out/bin/codex-responses-proxy-demo";
      meta = meta // {
        description = "Shows codex-responses-proxy at work, with no account and no internet";
        mainProgram = "codex-responses-proxy-demo";
      };
    }
  );
in
{
  inherit
    craneLib
    package
    demo
    sources
    dev
    ;
}
